# SPDX-License-Identifier: Apache-2.0
"""Training: how an adapter is trained on many tasks, and learns a further one."""
