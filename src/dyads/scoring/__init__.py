# SPDX-License-Identifier: Apache-2.0
"""Scoring: answers of a run's model to the instances of tasks, and their scores."""
