# SPDX-License-Identifier: Apache-2.0
"""Report: a comparison as one HTML page, and its figures as in a paper."""
