# SPDX-License-Identifier: Apache-2.0
"""Data: from the examples of tasks to batches.

`mixture` computes the schedule, the examples of every batch (without torch); `tokens` turns an example into token ids
and labels, and `batches` turns those into tensors.
"""
