# SPDX-License-Identifier: Apache-2.0
"""Doors of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from doors import Case, door, refuses
from dyads import use_task
from dyads.errors import RoutingError
from tiny import TARGETS, TASKS, adapted_layers, task_of, tiny_model

LONG = {"max_new_tokens": 5, "min_new_tokens": 5}


def saved(case: Case) -> PeftModel:
    """A model whose adapter is in `adapter`, and its base model in `base`."""
    tiny_model("llama").save_pretrained(case.folder / "base")
    model = case.model(task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(case.folder / "base")
    model.save_pretrained(case.folder / "adapter")
    return model


@door("transformers", "`AutoModelForCausalLM.from_pretrained(adapter)`")
def from_pretrained(case: Case) -> None:
    model = saved(case)
    loaded = AutoModelForCausalLM.from_pretrained(case.folder / "adapter")
    assert_close(case.logits(loaded), case.logits(model), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(b, dict(model.named_buffers())[f"base_model.model.{n}"]) for n, b in loaded.named_buffers())


@door("transformers", "`load_adapter`, `add_adapter`, `set_adapter`, `disable_adapters`, `delete_adapter`")
def load_adapter(case: Case) -> None:
    model, loaded = saved(case), tiny_model("llama").eval()
    base = case.bare(loaded)
    loaded.load_adapter(str(case.folder / "adapter"))
    assert_close(case.logits(loaded), case.logits(model), atol=1e-5, rtol=1e-5)
    loaded.add_adapter(case.config(), "other")
    assert not torch.equal(case.logits(loaded), case.logits(model))
    loaded.set_adapter("default")
    assert_close(case.logits(loaded), case.logits(model), atol=1e-5, rtol=1e-5)
    loaded.disable_adapters()
    assert torch.equal(case.bare(loaded), base)
    loaded.enable_adapters()
    loaded.delete_adapter("default")
    assert loaded.active_adapters() == ["other"]
    loaded.delete_adapter("other")
    assert torch.equal(case.bare(loaded), base)


@door("transformers", "`save_pretrained` of such a model")
def saved_by_transformers(case: Case) -> None:
    model = tiny_model("llama").eval()
    model.add_adapter(case.config())
    model.save_pretrained(case.folder)
    loaded = tiny_model("llama").eval()
    loaded.load_adapter(str(case.folder))
    assert_close(case.logits(loaded), case.logits(model), atol=1e-5, rtol=1e-5)


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 61)}}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="w2")


@door("transformers", "`pipeline`, within `use_task` where gates look at the task")
def piped(case: Case) -> None:
    model = case.model(task_type="CAUSAL_LM")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
    options = {**LONG, "do_sample": False, "return_full_text": False}
    with use_task(model, "cola") if case.task else torch.no_grad():
        answer = pipe("w5 w7 w9", **options)[0]["generated_text"]
    ids = torch.tensor([[5, 7, 9]])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **case.one_task, **LONG, do_sample=False
    )
    assert answer.split() == tokenizer().decode(expected[0, 3:]).split()


@door("transformers", "`generate`: greedy, beams, sampling, several sequences, a static cache")
def generated(case: Case) -> None:
    model = case.model()
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"cache_implementation": "static"}):
        together = model.generate(**case.inputs, **case.task, **LONG, do_sample=False, **options)
        rows = options.get("num_return_sequences", 1)
        for i in range(3):
            alone = {k: v[i : i + 1] for k, v in case.inputs.items()}
            one = task_of(case.variant.config(), TASKS[i])
            expected = model.generate(**alone, **one, **LONG, do_sample=False, **options)
            assert torch.equal(together[rows * i : rows * (i + 1)], expected)
    assert len(model.generate(**case.inputs, **case.task, **LONG, do_sample=True, num_return_sequences=2)) == 6


@door("transformers", "`generate(assistant_model=…)`, with an adapter on the model and on its assistant")
def assisted(case: Case) -> None:
    model, draft = case.model(), case.model()
    ids = {k: v[:1] for k, v in case.inputs.items()}
    expected = model.generate(**ids, **case.one_task, **LONG, do_sample=False)
    assert torch.equal(
        expected, model.generate(**ids, **case.one_task, **LONG, do_sample=False, assistant_model=tiny_model("llama"))
    )
    with use_task(draft, "rte") if case.task else torch.no_grad():
        for assistant in (draft, draft.base_model.model):
            found = model.generate(**ids, **case.one_task, **LONG, do_sample=False, assistant_model=assistant)
            assert torch.equal(expected, found)


@door("transformers", "`generate_batch` (continuous batching), with a task for every request")
def continuous(case: Case) -> None:
    model, prompts = case.model(), [[3, 4, 5], [6, 7], [8, 9]]
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    if case.task:
        with refuses(RoutingError, "pass task=…, one name or id for every request"):
            model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small)
        with refuses(RoutingError, "a manager of continuous batching joins the tokens of all requests"):
            model.init_continuous_batching(generation_config=greedy)
    given = {"task": ["cola", "rte", "cola"]} if case.task else {}
    found = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=small, **given)
    assert [answer.prompt_ids for answer in found.values()] == prompts
    for number, (prompt, answer) in enumerate(zip(prompts, found.values(), strict=True)):
        one = {"task": given["task"][number]} if given else {}
        alone = model.generate(input_ids=torch.tensor([prompt]), generation_config=greedy, **one)
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


@door("transformers", "packed sequences: `position_ids` that restart, a task for each")
def packed(case: Case) -> None:
    model, ids = case.model(), case.inputs["input_ids"]
    positions = torch.arange(ids.shape[1]).repeat(len(ids))[None]
    with torch.no_grad():
        found = model(input_ids=ids.reshape(1, -1), position_ids=positions, use_cache=False, **case.task).logits
    assert_close(found.view(*ids.shape, -1), case.logits(model), atol=1e-5, rtol=1e-5)


class Rows(Dataset[dict[str, Any]]):
    """Six rows with a task each."""

    def __init__(self, case: Case) -> None:
        ids = torch.cat([case.inputs["input_ids"]] * 2)
        self.rows = [{"input_ids": row, "labels": row} for row in ids]
        if case.task:
            self.rows = [{**row, "task": i % 3} for i, row in enumerate(self.rows)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def trainer(case: Case, model: PeftModel, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", max_steps=2, per_device_train_batch_size=3,
        disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(case), data_collator=default_data_collator)


@door("transformers", "`Trainer`, with `remove_unused_columns=False` where gates look at the task")
def trained(case: Case) -> None:
    model = case.model().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer(case, model, case.folder, remove_unused_columns=False, gradient_accumulation_steps=2).train()
    assert any(not torch.equal(model.get_parameter(n), p) for n, p in before.items())


@door("transformers", "gradient checkpointing, reentrant or not")
def checkpointed(case: Case) -> None:
    model = case.model().train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**case.inputs, **case.task, labels=case.inputs["input_ids"]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.base_model.model.enable_input_require_grads()
    for reentrant in (True, False):
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert_close(gradients(), expected)


@door("transformers", "encoder-decoders (T5), encoders (BERT), a head of GPT-2")
def other_models(case: Case) -> None:
    for kind in ("t5", "bert", "gpt2"):
        model = get_peft_model(tiny_model(kind), case.config(target_modules=TARGETS[kind]))
        assert adapted_layers(model)
        given = case.inputs | ({"decoder_input_ids": case.inputs["input_ids"]} if kind == "t5" else {})
        model(**given, **case.task).logits.sum().backward()
