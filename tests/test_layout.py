# SPDX-License-Identifier: Apache-2.0
"""Do the rooms keep their walls, is the package light, and are the public names the intended ones?"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dyads
from dyads.methods import methods

SOURCE = Path(dyads.__file__).parent
ORDER = {  # what a room may import, beside itself and `errors`: the rooms that come before it
    "errors": set(),
    "versions": set(),
    "console": set(),
    "reading": set(),
    "markdown": set(),
    "ops": set(),
    "methods": {"ops"},
    "tuner": {"methods"},
    "tasks": {"reading"},
    "data": {"tasks"},
    "recipe": {"data", "methods"},
    "models": {"recipe", "tuner"},
    "runs": {"models", "markdown"},
    "scoring": {"runs", "console"},
    "comparing": {"runs"},
    "export": {"scoring"},
    "analysis": {"scoring", "comparing"},
    "training": {"analysis"},
    "studies": {"training"},
    "report": {"studies"},
    "serving": {"scoring"},
    "cli": {"report", "export", "serving"},
    "__main__": {"cli"},
}


def before(room: str) -> set[str]:
    """Every room that an arrow of `ORDER` leads back to."""
    return ORDER[room].union(*(before(one) for one in ORDER[room]))


ROOMS = {room: before(room) for room in ORDER}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            assert node.module
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_arrows_point_forward_only() -> None:
    for path in FILES:
        if path == SOURCE / "__init__.py":
            continue  # the door: it names the public things of all rooms
        room = room_of(path)
        assert room in ROOMS, f"{room} is a new room: say what it may import"
        for name in imports(path):
            first, _, rest = name.partition(".")
            other = rest.split(".")[0]
            if first == "dyads" and rest and other not in ("errors", "__version__", room):
                assert other in ROOMS[room], f"{path} imports {name}: {room} may not look at {other}"
            if room == "ops":
                assert first in sys.stdlib_module_names | {"dyads", "torch"}, f"ops imports {name}"


def test_only_the_tuner_knows_the_inside_of_peft() -> None:
    for path in FILES:
        inside = {n for n in imports(path) if n.startswith(("peft.tuners", "peft.mapping"))}
        assert not inside or room_of(path) == "tuner", path


def test_every_file_says_its_licence_and_what_it_answers() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), path
        assert not {"utils", "common", "helpers", "misc"} & {part.removesuffix(".py") for part in path.parts}, path
        assert len(path.relative_to(SOURCE).parts) <= 2, f"{path}: never a third level"


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_and_asking_for_help_stays_light() -> None:
    names = ("torch", "peft", "transformers", "datasets", "pandas", "matplotlib", "jinja2", "trl", "scipy", "pydantic")
    heavy = str(set(names))
    assert run(f"import sys, dyads; print(sorted({heavy} & set(sys.modules)))") == "[]"
    code = "import sys; from dyads.cli import main; main(['--help'], standalone_mode=False)"
    assert run(f"{code}; print(sorted({heavy} & set(sys.modules)))").endswith("[]")


ORDERS = [
    "import dyads, importlib.util; importlib.util.find_spec('peft'); import peft",
    "from dyads import MoDEConfig",
]
MORE_ORDERS = [
    "import dyads, peft",
    "import peft, dyads",
    "import dyads.methods",
    "import dyads.tuner",
    "from dyads.methods.more import MoREConfig",
    "import dyads.training.train",
]
IN_FORKS = """
import os, sys
import transformers.modeling_utils  # what takes long; a fork for every order imports the rest
for order in sys.argv[1:]:
    assert not {"dyads", "peft"} & set(sys.modules)
    if os.fork() == 0:
        exec(order)
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
        print(*sorted(name for name in known if "DYADS" in name), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.parametrize("orders", [ORDERS, pytest.param(MORE_ORDERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_peft_knows_the_methods_in_whatever_order_things_are_imported(orders: list[str]) -> None:
    known = " ".join(sorted(f"DYADS_{method.key.upper()}" for method in methods()))
    assert dict(zip(orders, run(IN_FORKS, *orders).splitlines(), strict=True)) == dict.fromkeys(orders, known)


def test_public_names() -> None:
    functions = {"add_task", "auxiliary_loss", "parameter_groups", "use_task", "with_tasks"}
    assert set(dyads.__all__) == {"__version__", "TaskCollator"} | functions
    assert {name for name in dir(dyads) if name not in dyads.__all__} == {m.config.__name__ for m in methods()}
    for name in dir(dyads):
        assert getattr(dyads, name) is not None
    with pytest.raises(AttributeError, match="module 'dyads' has no attribute 'MoDConfig'"):
        _ = dyads.MoDConfig  # type: ignore[attr-defined]


def test_names_of_test_files_are_unique() -> None:
    """Without packages in tests/, pytest imports a second file of one name as the first."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []
