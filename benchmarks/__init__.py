# SPDX-License-Identifier: Apache-2.0
"""How fast is dyads, beside every rival? `python -m benchmarks --help` says how to ask."""
