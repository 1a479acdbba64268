# SPDX-License-Identifier: Apache-2.0
"""Tests of the distribution: what the wheel holds, extras, and the supported versions of PEFT and transformers."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dyads
from dyads import versions
from dyads.errors import DyadsError

if sys.version_info >= (3, 11):
    import tomllib
else:  # the parser that pytest brings
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements(lines: list[str]) -> Iterator[Requirement]:
    """Requirements of a list, with those of the extras that it names."""
    for line in lines:
        one = Requirement(line)
        if one.name == "dyads":
            for extra in sorted(one.extras):
                assert extra in EXTRAS, f"{line}: pyproject.toml has no extra '{extra}'"
                yield from requirements(EXTRAS[extra])
        else:
            yield one


# --- extras -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_names_its_oldest_versions(extra: str) -> None:
    unbounded = [str(r) for r in requirements(EXTRAS[extra]) if not r.specifier and not r.name.startswith("types-")]
    assert not unbounded, f"extra {extra}: {unbounded} without a lower bound"


def test_what_make_installs_is_pinned() -> None:
    pinned = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pinned.add(re.sub(r"[-_.]+", "-", Requirement(line).name).lower())
    lines = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["quantised"]]
    needed = {re.sub(r"[-_.]+", "-", r.name).lower() for r in requirements(lines)}
    assert sorted(needed - pinned) == [], "constraints.txt does not pin them"


def test_make_extras_checks_every_extra() -> None:
    modules = runpy.run_path(str(ROOT / ".ci/extras.py"))["MODULES"]
    assert set(modules) == set(EXTRAS) - {"dev"}
    ours = [name for names in modules.values() for name in names if name.startswith("dyads.")]
    assert [name for name in ours if find_spec(name) is None] == []


def test_extras_that_messages_and_pages_name_exist() -> None:
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile"]
    named = {
        (extra.strip(), path.relative_to(ROOT).as_posix())
        for path in files
        for group in re.findall(r"dyads\[([\w, -]+)\]", path.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert any(extra == "study" for extra, _ in named)
    assert sorted(one for one in named if one[0] not in EXTRAS) == []


# --- versions ---------------------------------------------------------------------------------------------------------


def test_the_supported_range_is_that_of_the_distribution() -> None:
    declared = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"]) if r.name in versions.SUPPORTED}
    assert declared == {name: Requirement(f"{name}{text}").specifier for name, text in versions.SUPPORTED.items()}


@pytest.mark.parametrize(
    ("name", "version", "allowed"),
    [
        ("peft", "0.20.0", False),
        ("peft", "0.21.0", True),
        ("peft", "0.21.3.dev0", True),
        ("peft", "0.22.0.dev0", False),
        ("peft", "0.22.0", False),
        ("peft", "1.0", False),
        ("transformers", "4.57.6", False),
        ("transformers", "5.0.0rc1", False),
        ("transformers", "5.0.0", True),
        ("transformers", "5.99.1.dev0", True),
        ("transformers", "6.0.0", False),
    ],
)
def test_versions_outside_the_range_are_refused(
    name: str, version: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"peft": "0.21.2", "transformers": "5.23.0", name: version}
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    if allowed:
        versions.check_versions()
        return
    with pytest.raises(DyadsError) as caught:
        versions.check_versions()
    assert isinstance(caught.value, ImportError)
    assert str(caught.value) == (
        f"dyads supports {name} {versions.SUPPORTED[name]}, and {version} is installed:"
        f" pip install '{name}{versions.SUPPORTED[name]}'"
    )


def test_without_metadata_the_versions_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions.check_versions()


@pytest.mark.parametrize(
    "order", ["import dyads, peft", "import sys, types; sys.modules['peft'] = types.ModuleType('peft'); import dyads"]
)
def test_the_error_comes_before_any_other(order: str) -> None:
    old = "from importlib import metadata; real = metadata.version"
    old += "; metadata.version = lambda name: '0.20.0' if name == 'peft' else real(name)"
    done = subprocess.run([sys.executable, "-c", f"{old}\n{order}"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.rstrip().split("\n")[-1].startswith("dyads.errors.VersionError: dyads supports peft >=0.21,<0.22")
    )


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    assert sdist.name == f"dyads-{dyads.__version__}.tar.gz"
    source = ROOT / "src"
    files = [p for p in (source / "dyads").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {p.relative_to(source).as_posix() for p in files}
    assert "dyads/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    assert {n for n in names if n.startswith("dyads/")} == expected
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "dyads = dyads.cli:main" in entry_points


# --- citation ---------------------------------------------------------------------------------------------------------


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dyads.__version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
