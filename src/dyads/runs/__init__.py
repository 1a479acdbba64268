# SPDX-License-Identifier: Apache-2.0
"""What is a run? A folder: its recipe, log, adapter, predictions and scores; and what makes and compares them."""
