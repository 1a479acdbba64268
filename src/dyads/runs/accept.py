# SPDX-License-Identifier: Apache-2.0
"""Command `python -m dyads.runs.accept FOLDER`: write the manifests of a run or an adapter for its files as they are.

For a run that an earlier version of dyads wrote without manifests, and for files that were changed on purpose, such as
the path of a base model that was moved.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dyads.errors import DyadsError, RunError
from dyads.runs.folder import RunFolder
from dyads.runs.manifest import seal

__all__ = ["accept"]


def accept(path: Path) -> list[Path]:
    """Write the manifests of a run (its config, scores, adapter and checkpoints) or of a folder with an adapter."""
    folder = RunFolder(path)
    if not folder.has_config:
        if not (path / "adapter_config.json").is_file():
            raise RunError(f"'{path}' holds neither a run (config.yaml) nor an adapter (adapter_config.json)")
        seal(path)
        return [path]
    with folder.locked():
        return folder.accept()


if __name__ == "__main__":
    try:
        for written in (place for argument in sys.argv[1:] for place in accept(Path(argument))):
            print(f"manifest of {written} written")
    except (DyadsError, OSError) as error:
        sys.exit(f"Error: {error}")
