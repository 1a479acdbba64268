# SPDX-License-Identifier: Apache-2.0
"""The benchmark is no part of the package: its folder's parent goes on the path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
