# SPDX-License-Identifier: Apache-2.0
"""Studies: grids of runs, the claims that they decide, and the processes that train them."""
