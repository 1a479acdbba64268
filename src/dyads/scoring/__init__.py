# SPDX-License-Identifier: Apache-2.0
"""Scoring: how the questions of tasks are answered, and the answers scored."""
