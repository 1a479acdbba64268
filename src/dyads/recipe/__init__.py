# SPDX-License-Identifier: Apache-2.0
"""Recipes: what a run does, as a typed spec read from YAML."""
