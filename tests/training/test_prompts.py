# SPDX-License-Identifier: Apache-2.0
"""Own rows in real runs: the chat template is recorded and read again, answers keep their blanks, positions suffice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dyads.errors import ConfigError
from dyads.models.load import load_tokenizer
from dyads.models.prompts import chat_template_of, positions_of
from dyads.recipe.spec import ModelSpec, Recipe
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.scoring.evaluate import evaluate
from dyads.tasks import load, load_suite
from dyads.training.adapt import adapt_recipe
from dyads.training.train import Training, train

Tiny = Callable[..., Recipe]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER = CHATML.replace("m['role'] + '\n'", "m['role'] + ': '")


def save_tokenizer(path: Path, template: str | None) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>", extra_special_tokens=special[2:]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


@pytest.fixture
def instruct(tmp_path: Path) -> Path:
    """A tiny Llama with a chat template whose answers end in another token than eos."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=260,
        **sizes,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "instruct")
    save_tokenizer(tmp_path / "instruct", CHATML)
    return tmp_path / "instruct"


ROWS = [
    {"task": "code", "input": "f", "output": "    return f", "split": "train"},
    {"task": "code", "input": "g</s>", "output": "  g </s>", "split": "train"},
    {"task": "code", "input": "f", "output": "    return f", "split": "test"},
]


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {"family": "files", "path": str(path), "metric": "exact_match"}


def prompt(folder: RunFolder, number: int = 0) -> str:
    answerer, (task,) = Answerer(folder), load_suite(folder.recipe().tasks).tasks
    return str(answerer.tokenizer.decode(answerer.prompt_tokenizer.prompt(task.train[number])))  # type: ignore[union-attr]


def test_a_chat_model_learns_and_answers_in_its_own_form(
    tiny: Tiny, instruct: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    recipe = tiny(
        "lora", instruct, tasks=rows, train={"steps": 80, "batch_size": 2, "learning_rate": 0.03},
        evaluate={"split": "train", "max_new_tokens": 20}, options={"r": 8, "lora_alpha": 16},
    )  # fmt: skip
    folder = train(recipe, tmp_path / "run")
    assert folder.chat_template() == CHATML
    answers = [p["prediction"] for p in folder.predictions("code")]
    assert answers == ["    return f", "  g </s>"]
    assert prompt(folder, 1) == "<|im_start|>user\ng</s><|im_end|>\n<|im_start|>assistant\n"
    suite = load_suite(recipe.tasks)
    encoded = Training(recipe, suite, CHATML).dataset[0, 1]
    own = load_tokenizer(str(instruct))
    assert own.decode(encoded.input_ids) == f"{prompt(folder, 1)}  g </s><|im_end|>"
    assert (encoded.input_ids.count(1), encoded.input_ids.count(3)) == (0, 2)

    save_tokenizer(instruct, OTHER)  # the run keeps the template that it was trained with
    assert evaluate(folder)["micro"]["exact_match"] == 100.0
    assert prompt(folder) == "<|im_start|>user\nf<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("method", ["zero-shot", "mode"])
def test_the_recipe_chooses_the_template(
    method: str, tiny: Tiny, instruct: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    folder = train(tiny(method, instruct, tasks=rows, model_={"chat_template": "none"}), tmp_path / "none")
    assert (folder.chat_template(), prompt(folder)) == (None, "f\n")
    (tmp_path / "own.jinja").write_text(OTHER)
    chosen = {"chat_template": str(tmp_path / "own.jinja")}
    folder = train(tiny(method, instruct, tasks=rows, model_=chosen), tmp_path / "file")
    (tmp_path / "own.jinja").unlink()
    assert folder.chat_template() == OTHER
    assert prompt(folder) == "<|im_start|>user: f<|im_end|>\n<|im_start|>assistant\n"


def test_published_protocols_are_read_as_they_are(tiny: Tiny, instruct: Path, tmp_path: Path) -> None:
    one = {"family": "starter", "names": ["first_word"], "train_per_task": 2, "test_per_task": 1}
    folder = train(tiny("mode", instruct, tasks=one, train={"steps": 1, "batch_size": 2}), tmp_path / "run")
    assert folder.chat_template() is None
    assert prompt(folder).startswith("Words: ")


def test_an_adapted_run_keeps_the_template_of_its_run(
    tiny: Tiny, instruct: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    first = train(tiny("more", instruct, tasks=rows), tmp_path / "first", evaluate=False)
    save_tokenizer(instruct, OTHER)
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({**row, "task": "new"}) + "\n" for row in ROWS))
    recipe = adapt_recipe(first.path, new, {"start": "mean"}, ["train.steps=1", "train.batch_size=2"])
    folder = train(recipe, tmp_path / "second", evaluate=False)
    assert folder.chat_template() == CHATML
    assert list(folder.templates()) == ["code", "new"]


def test_templates_that_have_no_effect_or_cannot_be_read_are_refused(instruct: Path, rows: dict[str, Any]) -> None:
    tokenizer, own = load_tokenizer(str(instruct)), load(rows)
    starter = load({"family": "starter", "names": ["first_word"], "train_per_task": 1})

    def of(template: str, tasks: Any = own, kind: Any = "causal") -> str | None:
        return chat_template_of(ModelSpec(name="tiny", chat_template=template), kind, tokenizer, tasks)

    assert [of("auto"), of("none"), of("auto", starter), of("auto", own, "seq2seq")] == [CHATML, None, None, None]
    with pytest.raises(ConfigError, match=r"model\.chat_template: cannot read 'nowhere\.jinja': No such file"):
        of("nowhere.jinja")
    with pytest.raises(ConfigError, match=r"'nowhere\.jinja' has no effect: no task is in chat form"):
        of("nowhere.jinja", starter)
    with pytest.raises(ConfigError, match="is for decoders, and 'tiny' is an encoder-decoder: leave it out"):
        of("x.jinja", own, "seq2seq")
    tokenizer.chat_template = None
    assert of("auto") is None


@pytest.mark.parametrize("method", ["mode", "zero-shot"])
def test_prompts_beyond_a_models_positions_leave_room_for_the_answer(method: str, tiny: Tiny, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=260, n_embd=32, n_layer=1, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    assert positions_of(config) == 48
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", None)
    path = tmp_path / "long.jsonl"
    lines = [{"task": "t", "input": "long " * n, "output": "answer " * 20} for n in range(1, 31)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = {"family": "files", "path": str(path)}
    options = {"target_modules": ["c_attn"]} if method == "mode" else {}
    recipe = tiny(method, tmp_path / "gpt2", tasks=tasks, options=options, evaluate={"max_new_tokens": None})
    folder = train(recipe, tmp_path / "run")
    assert folder.is_scored
    likelihood = {**recipe.resolved(), "evaluate": {"answer": "likelihood"}}
    labelled = [{**line, "output": str(n % 2), "labels": ["0", "1"]} for n, line in enumerate(lines)]
    path.write_text("".join(json.dumps(line) + "\n" for line in labelled))
    assert train(Recipe.model_validate(likelihood), tmp_path / "likelihood").is_scored
