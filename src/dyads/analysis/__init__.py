# SPDX-License-Identifier: Apache-2.0
"""Analysis: what a trained adapter learned, one question a file."""
