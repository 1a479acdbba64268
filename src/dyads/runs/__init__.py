# SPDX-License-Identifier: Apache-2.0
"""Run folders: the recipe, log, adapter, predictions and scores of one training."""
