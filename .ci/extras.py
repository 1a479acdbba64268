# SPDX-License-Identifier: Apache-2.0
"""Each extra by itself: installed beside the wheel, imported, and nothing of the core replaced (`make extras`).

    python .ci/extras.py build/wheel dist/dyads-0.1.0-py3-none-any.whl [EXTRA...]

`build/wheel` is the environment of `make wheel`: the wheel and no extra. Every extra gets an environment that sees that
one, so that only what the extra adds is installed, beside the versions of the core that are there. The extra
`dev` is what `make test` runs in.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

MODULES = {
    "datasets": ["datasets"],
    "docs": ["latex2mathml.converter", "material", "mkdocs", "mkdocstrings"],
    "eval": ["lm_eval", "dyads.scoring.harness"],
    "packaged": ["gguf", "dyads.models.packaged"],
    "quantised": ["bitsandbytes", "optimum.quanto", "torchao"],
    "reasoning-gym": ["reasoning_gym"],
    "report": ["matplotlib", "dyads.report.figures"],
    "serve": ["fastapi", "prometheus_client", "uvicorn", "dyads.serving.server"],
    "study": ["ray"],
    "tensorboard": ["tensorboard"],
    "trackio": ["trackio"],
    "trl": ["trl.trainer.sft_trainer", "dyads"],
    "wandb": ["wandb"],
}
"""What is imported for an extra: its packages, and the module of dyads that needs them."""


def run(*command: object) -> str:
    """The output of a command; a failure ends the script."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def packages(environment: Path) -> tuple[Path, set[str]]:
    """The folder of an environment's packages, and their names."""
    folder = Path(
        run(environment / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    return folder, {path.name.partition("-")[0] for path in folder.glob("*.dist-info")} - {"pip", "setuptools"}


def check(extra: str, core: Path, constraints: Path, wheel: Path, folder: Path) -> int:
    """Install and import an extra; returns how many packages it adds to the core's."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True, symlinks=True)
    there, known = packages(core)
    (packages(folder)[0] / "core.pth").write_text(f"{there.absolute()}\n", encoding="utf-8")
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", "-c", constraints, f"{wheel}[{extra}]")
    run(python, "-c", "import dyads; " + "; ".join(f"import {module}" for module in MODULES[extra]))
    _, added = packages(folder)
    if replaced := added & known:
        raise SystemExit(f"{extra} installs other versions than the core of {', '.join(sorted(replaced))}")
    return len(added)


def main() -> None:
    """All extras, or those named."""
    core, wheel, names = Path(sys.argv[1]), Path(sys.argv[2]).absolute(), sys.argv[3:]
    folder = Path("build/extras")
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "core.txt"
    constraints.write_text(run(core / "bin/python", "-m", "pip", "freeze", "--exclude", "dyads"), encoding="utf-8")
    for extra in names or MODULES:
        added = check(extra, core, constraints, wheel, folder / extra)
        print(f"{extra}: {added} packages more, imported", flush=True)


if __name__ == "__main__":
    main()
