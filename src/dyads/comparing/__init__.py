# SPDX-License-Identifier: Apache-2.0
"""Comparing: how the scores of several runs stand side by side."""
