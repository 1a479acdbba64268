# SPDX-License-Identifier: Apache-2.0
"""Supported versions of PEFT and transformers, and the error outside them."""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

from dyads.errors import VersionError

__all__ = ["SUPPORTED", "check_versions"]

# The tuner relies on private names of PEFT; each is listed where it is used, with the versions it was checked with.
SUPPORTED = {"peft": ">=0.21,<0.22", "transformers": ">=5.0,<6"}
"""As in pyproject.toml. The tests were run with the oldest of both, and with the newest."""


def check_versions() -> None:
    """Refuse a PEFT or transformers outside the supported range, before one of their names is missed.

    The versions are those of the installed distributions; nothing is imported, and a copy without metadata passes.
    """
    for name, supported in SUPPORTED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if not SpecifierSet(supported).contains(found, prereleases=True):
            raise VersionError(
                f"dyads supports {name} {supported}, and {found} is installed: pip install '{name}{supported}'"
            )
