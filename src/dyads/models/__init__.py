# SPDX-License-Identifier: Apache-2.0
"""Base models: where they come from, and the heads and attention that dyads gives them."""
