# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of dyads beside its rivals; `python -m benchmarks --help` shows how to run them."""
