# SPDX-License-Identifier: Apache-2.0
"""How do tasks become batches?

`mixture` decides which example is read when (no torch needed), `tokens` turns an example into token ids and labels, and
`batches` turns those into tensors.
"""
