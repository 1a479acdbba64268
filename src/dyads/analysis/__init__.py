# SPDX-License-Identifier: Apache-2.0
r"""Analysis: what a trained adapter learned, one question a file.

A file of this folder is a question of `dyads inspect` where it has a line of help and a function `answer`. To add
`--what size`, write the file `analysis/size.py`; nothing else changes, and the tests of the questions include it:

    '''Size: parameters of an adapter by layer.'''

    QUESTION = "trained parameters by layer"

    @dataclass(frozen=True)
    class Size:
        parameters: NamedArray
        notes: tuple[str, ...] = ()

        @property
        def tables(self) -> tuple[Table, ...]:
            rows = tuple((layer, f"{number:,.0f}") for (layer,), number in self.parameters.rows())
            return (Table("Trained parameters", ("layer", "parameters"), rows),)

    def answer(run: Path) -> Size:
        '''The size of the adapter in a folder.'''
        layers = SavedAdapter.read(run).layers
        return Size(NamedArray.of([layer.parameters for layer in layers], layer=[layer.module for layer in layers]))

- The result has `tables` for the terminal, NamedArrays for JSON and CSV, and `notes`.
- Further arguments of `answer` are the options that the question takes: `instances`, `task` and `instance`, each with a
  default or None. Where the first argument is named `runs`, it is a sequence of at least two folders.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["questions"]

_LINE = re.compile(r'^QUESTION = "(.+)"$', re.MULTILINE)


def questions() -> dict[str, str]:
    """Name and line of help of every question, by the names of their files. No file is imported."""
    found = {}
    for path in sorted(path for folder in __path__ for path in Path(folder).glob("*.py")):
        if line := _LINE.search(path.read_text(encoding="utf-8")):
            found[path.stem] = line[1]
    return found
