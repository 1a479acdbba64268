# SPDX-License-Identifier: Apache-2.0
"""Run folders made without a run, and tiny models with a tokenizer of the starter tasks' words for real runs."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from dyads.recipe.spec import Recipe
from dyads.runs.contents import Prediction, ScoreRow, Scores
from dyads.runs.folder import RunFolder
from dyads.tasks import load
from dyads.training.train import train


def recipe_of(name: str, *, method: str = "mode", seed: int = 0, **sections: Any) -> Recipe:
    options = {"r": 4} if method not in ("zero-shot", "majority") else {}
    return Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "model": {"name": "tiny"},
            "method": {"name": method, **options},
            "tasks": {"family": "starter"},
            **sections,
        }
    )


def write_run(
    path: Path,
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    method: str = "mode",
    seed: int = 0,
    metrics: Mapping[str, str] | None = None,
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    parameters: int = 1000,
    split: str = "test",
    losses: Sequence[tuple[int, float]] = (),
    **sections: Any,
) -> RunFolder:
    """A folder as an evaluation leaves it; `values` are headline scores, `changed` overrides score rows."""
    recipe = recipe_of(name, method=method, seed=seed, **sections)
    folder = RunFolder.create(path, recipe)
    rows: list[ScoreRow] = []
    predictions: dict[str, list[Prediction]] = {}
    for task, scores in values.items():
        metric = (metrics or {}).get(task, "rouge_l")
        row = ScoreRow(
            task=task,
            version=1,
            fingerprint=f"print-{task}",
            category="",
            metric=metric,
            value=sum(scores) / len(scores),
            n=len(scores),
            higher_is_better=True,
            headline=True,
        )
        rows.append(ScoreRow(**{**row, **(changed or {}).get(task, {})}))  # type: ignore[typeddict-item]
        predictions[task] = [
            Prediction(id=f"{task}-{i}", prediction="a", references=["b"], scores={metric: float(s)})
            for i, s in enumerate(scores)
        ]
    for step, loss in losses:
        folder.append_log({"step": step, "loss": loss})
    everything = [s for scores in values.values() for s in scores]
    folder.write_results(
        predictions,
        Scores(
            schema=1,
            run=name,
            method=method,
            split=split,
            seed=seed,
            parameters=parameters,
            seconds={"train": 61.0, "evaluate": 5.0},
            steps=100,
            scores=rows,
            micro={"headline": sum(everything) / len(everything)},
            macro={"headline": sum(r["value"] for r in rows) / len(rows)},
        ),
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a synthetic run into a folder of the test and gives its path."""

    def write(name: str, values: Mapping[str, Sequence[float]], *, seed: int = 0, **facts: Any) -> Path:
        path = tmp_path / f"{name}-seed{seed}"
        return write_run(path, name, values, seed=seed, **facts).path

    return write


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A small valid recipe, with sections replaced."""
    return recipe_of


def write_sni(folder: Path) -> dict[str, Any]:
    """Options of Super-NaturalInstructions by the release's protocol: task001 and task002 train, task003 is unseen."""
    names = [f"task00{n}_colours" for n in (1, 2, 3)]
    for part in ("tasks", "splits/default", "splits/xlingual"):
        (folder / part).mkdir(parents=True)
    for name in names:
        rows = [{"id": f"{name}-{i}", "input": f"thing {i}", "output": [f"colour {i % 3}"]} for i in range(120)]
        content = {"Definition": [f"Name a {name}."], "Positive Examples": [], "Negative Examples": []}
        text = json.dumps({**content, "Categories": [], "Output_language": ["English"], "Instances": rows})
        (folder / "tasks" / f"{name}.json").write_text(text)
    for track in ("default", "xlingual"):
        (folder / "splits" / track / "train_tasks.txt").write_text("\n".join(names[:2]))
        (folder / "splits" / track / "test_tasks.txt").write_text(names[2])
    return {"family": "sni", "path": str(folder), "protocol": "official", "demonstrations": 0}


# --- real, tiny runs --------------------------------------------------------------------------------------------------

TASKS = ("first_word", "count_words", "has_animal")
STARTER = {
    "family": "starter",
    "names": TASKS,
    "train_per_task": 12,
    "validation_per_task": 3,
    "test_per_task": 4,
}


@pytest.fixture(scope="session", autouse=True)
def _tiny_runs_take_no_longer_than_they_must() -> Iterator[None]:
    """Leave out what takes half the time of a tiny run and has no effect on it."""
    gc.collect()
    gc.freeze()  # the library collects garbage between training and evaluation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))  # after every training
        patch.setattr(os, "fsync", lambda handle: None)  # which matters when the power fails
        yield


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: the words of the starter tasks used here."""
    splitter = pre_tokenizers.Whitespace()
    examples = [e for task in load(STARTER) for split in (task.train, task.validation, task.test) for e in split]
    texts = [text for e in examples for text in (e.prompt, *e.references)]
    known = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *known])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_llama(path: Path, words: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """A folder with a tiny Llama, the same every time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # so that answers differ from one another
    }
    config = LlamaConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, **{**sizes, **changes})
    LlamaForCausalLM(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), words)


@pytest.fixture(scope="session")
def other_llama(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Makes a folder with another tiny Llama."""
    return lambda **changes: save_llama(tmp_path_factory.mktemp("other"), words, **changes)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory, words: PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    path = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(T5Config(vocab_size=len(words), **ids, **sizes)).save_pretrained(path)
    words.save_pretrained(path)
    return path


ANSWERS = {"yes": "entailment", "maybe": "neutral", "no": "contradiction"}
NUMBERS = ("none", "one", "two", "three", "four", "five")
THINGS = ("river", "stone", "lamp", "fox", "tree")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_pairs(tmp_path_factory.mktemp("glue"))


def write_pairs(path: Path) -> dict[str, Any]:
    """Two tiny GLUE tasks, as a recipe names them: three labels, and numbers; in both one word gives the answer."""
    for name, answers, column in (
        ("MNLI", tuple(ANSWERS.items()), "gold_label"),
        ("STS-B", tuple((word, f"{i}.000") for i, word in enumerate(NUMBERS)), "score"),
    ):
        (path / name).mkdir()
        for split, size in (("train", 36), ("dev_matched" if name == "MNLI" else "dev", 18)):
            rows = [f"sentence1\tsentence2\t{column}"]
            for i in range(size):
                word, answer = answers[i % len(answers)]
                first, second = THINGS[i % 5], " ".join([THINGS[i % 4]] * (1 + i % 3))
                rows.append(f"{first}\t{second} {word}\t{answer}")
            (path / name / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return {"family": "glue", "path": str(path), "names": ["mnli", "stsb"]}


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def save_bert(path: Path) -> Path:
    """A folder with a tiny encoder, and a tokenizer that dresses texts and pairs as BERT's."""
    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *ANSWERS, *NUMBERS, *THINGS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    marks = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **marks).save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Little dropout, so that a few steps show what is learned; some, so that resuming must bring back the generators.
    drops = {"hidden_dropout_prob": 0.01, "attention_probs_dropout_prob": 0.01}
    config = BertConfig(vocab_size=len(known), max_position_embeddings=16, initializer_range=0.2, **sizes, **drops)
    BertModel(config).save_pretrained(path)
    return path


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4},
    "mode": {"name": "mode", "r": 4, "num_experts": 3},
    "molora": {"name": "molora", "r": 2, "num_experts": 3},
    "molora-sd": {"name": "molora", "r": 4, "num_experts": 3, "shared_down": True},
    "more": {"name": "more", "r": 4, "preset": "paper", "lora_alpha": 4, "lora_dropout": 0.0},  # with its loss
}


@pytest.fixture
def tiny(llama: Path) -> Callable[..., Recipe]:
    """A recipe that runs in a moment: a method by its key, on the tiny Llama unless another model is given."""

    def make(method: str = "mode", model: Path | None = None, seed: int = 0, **sections: Any) -> Recipe:
        return tiny_recipe(method, model or llama, seed, **sections)

    return make


def tiny_recipe(method: str, model: Path, seed: int = 0, **sections: Any) -> Recipe:
    """A recipe that runs in a moment: a method by its key on a tiny model."""
    targets = {"t5": ["q", "v", "wo"], "bert": ["query", "value", "output.dense"]}.get(
        next((kind for kind in ("t5", "bert") if kind in Path(model).name), ""), ["q_proj", "v_proj", "down_proj"]
    )
    options = {"target_modules": targets, **METHODS[method]} if method in METHODS else {"name": method}
    train = {"steps": 3, "batch_size": 8, "learning_rate": 0.01, "logging_steps": 1, "save_steps": None}
    passed = {"disable_tqdm": True, **sections.get("train", {}).get("trainer", {})}
    return Recipe.model_validate(
        {
            "name": method,
            "seed": seed,
            "model": {"name": str(model), "dtype": "float32", **sections.get("model_", {})},
            "method": {**options, **sections.get("options", {})},
            "tasks": sections.get("tasks", STARTER),
            "mixture": sections.get("mixture", {}),
            "train": {**train, **sections.get("train", {}), "trainer": passed},
            "evaluate": {"batch_size": 4, "max_new_tokens": 4, **sections.get("evaluate", {})},
        }
    )


@pytest.fixture(scope="session")
def _trained() -> dict[str, RunFolder]:
    """Runs that were trained once, by name."""
    return {}


@pytest.fixture
def trained(
    tiny: Callable[..., Recipe],
    t5: Path,
    bert: Path,
    pairs: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    _trained: dict[str, RunFolder],
) -> Callable[..., RunFolder]:
    """A copy of a trained and scored run, for a method, the kind of its model and options of the method."""

    def copy(method: str, kind: str = "llama", **options: Any) -> RunFolder:
        name = "-".join([method, *[kind] * (kind != "llama"), *(f"{key}={value}" for key, value in options.items())])
        if name not in _trained:
            sections: dict[str, Any] = {"train": {"learning_rate": 0.05}, "options": options}
            if kind == "bert":
                sections |= {"tasks": pairs, "evaluate": {"max_new_tokens": None}}
            recipe = tiny(method, {"llama": None, "t5": t5, "bert": bert}[kind], **sections)
            _trained[name] = train(recipe, tmp_path_factory.mktemp("runs") / method)
        shutil.copytree(_trained[name].path, tmp_path / name)
        return RunFolder.open(tmp_path / name)

    return copy
