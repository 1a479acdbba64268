# SPDX-License-Identifier: Apache-2.0
"""Export: an adapter as files that other programs load without dyads."""

from dyads.export.lora import Exported, export, export_all, factors

__all__ = ["Exported", "export", "export_all", "factors"]
