# SPDX-License-Identifier: Apache-2.0
"""Write docs/compatibility.md from what the doors do."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

from doors import COLUMNS, doors
from doors.page import PAGE, write

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # some libraries write below the working directory
        cells = {
            (door.section, door.name): {
                column: door.cell(column, Path(folder) / str(number) / str(place))
                for place, column in enumerate(COLUMNS)
            }
            for number, door in enumerate(doors())
        }
    PAGE.write_text(write(doors(), cells), "utf-8")
