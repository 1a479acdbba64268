# SPDX-License-Identifier: Apache-2.0
"""Trainers of transformers and TRL: every row has its task in every forward pass, and auxiliary losses are trained."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from torch.testing import assert_close
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

import dyads
from dyads import with_tasks
from dyads.errors import RoutingError
from dyads.tuner.routing import Routing
from tiny import TARGETS, TASKS, Variant, adapted_layers, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the trainers' own
    pytest.mark.filterwarnings("error:the adapter has an auxiliary loss"),
    pytest.mark.filterwarnings("error:adapted layers were called"),
]

MORE = Variant("more", (("contrastive", 0.5), ("selector", "soft")))
FIRST = 10
"""The first token of a prompt is this plus its task."""
QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "learning_rate": 1e-2, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False,
}  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 61)}}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", eos_token="w2", unk_token="[UNK]")


def adapted(variant: Variant = MORE, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    options = {"target_modules": TARGETS["llama"], "init_weights": False, "lora_dropout": 0.0, **options}
    return get_peft_model(tiny_model("llama"), variant.config(**options)).train()


def rows(kind: str, count: int = 8) -> Dataset:
    """Rows of unequal lengths, whose first token says their task."""
    found = []
    for number in range(count):
        task = (number * 2) % 3
        prompt = f"w{FIRST + task} " + " ".join(f"w{20 + number + place}" for place in range(1 + number % 3))
        row: dict[str, Any] = {"prompt": prompt, "task": TASKS[task]}
        if kind in ("pairs", "triples"):
            row |= {"chosen": f" w{40 + number} w41", "rejected": f" w{50 - number}"}
            row |= {"reference": " w43 w44 w45"} if kind == "triples" else {}
        elif kind == "unpaired":
            row |= {"completion": f" w{40 + number}", "label": bool(number % 2)}
        elif kind == "prompts":
            pass
        elif kind == "text":
            row = {"text": f"{prompt} w{40 + number}", "task": row["task"]}
        else:
            row |= {"completion": f" w{40 + number} w45"}
        found.append(row)
    return Dataset.from_list(found)


class Seen:
    """The tasks that layers looked up, beside the tokens of the batch."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.batches: list[tuple[Tensor, Tensor]] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    found = Seen()
    inner = Routing.ids

    def ids(routing: Routing, adapter: str, x: Tensor) -> Tensor:
        task = inner(routing, adapter, x)
        found.batches.append((found.tokens[-1], task.clone()))
        return task

    monkeypatch.setattr(Routing, "ids", ids)
    yield found
    checked = 0
    assert found.batches
    for tokens, task in found.batches:
        if task.shape[:1] != tokens.shape[:1]:  # packed: a task for each token
            assert tokens.shape[0] == 1
            assert len(task) == tokens.shape[1]
            current = -1
            for token, of_token in zip(tokens[0].tolist(), task.tolist(), strict=True):
                current = token - FIRST if FIRST <= token < FIRST + 3 else current
                assert of_token == current
                checked += 1
            continue
        for row, of_row in zip(tokens.tolist(), task.tolist(), strict=True):
            marks = [token - FIRST for token in row if FIRST <= token < FIRST + 3]
            if marks:  # the later steps of generate see the last token only
                assert marks[0] == of_row
                checked += 1
    assert checked > 10


def watched(model: PeftModel, found: Seen) -> PeftModel:
    model.get_base_model().register_forward_pre_hook(
        lambda _, args, kwargs: found.tokens.append((args[0] if args else kwargs["input_ids"]).clone()),
        with_kwargs=True,
        prepend=True,
    )
    return model


def make(kind: str, model: PeftModel, *, wrap: bool = True, **options: Any) -> Any:
    dress = with_tasks if wrap else (lambda trainer: trainer)
    arguments = {**QUIET, **options}
    if kind == "trainer":
        data = rows("text").map(lambda row: {"input_ids": tokenizer()(row["text"])["input_ids"]}, remove_columns="text")
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        return dress(Trainer)(model, TrainingArguments("out", **arguments), train_dataset=data, data_collator=collator)
    given: dict[str, Any] = {"processing_class": tokenizer()}
    if kind == "sft":
        return dress(SFTTrainer)(model, SFTConfig("out", **arguments), train_dataset=rows("sft"), **given)
    if kind == "dpo":
        return dress(DPOTrainer)(model, args=DPOConfig("out", **arguments), train_dataset=rows("pairs"), **given)
    if kind == "kto":
        return dress(KTOTrainer)(model, args=KTOConfig("out", **arguments), train_dataset=rows("unpaired"), **given)
    pairs = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig), "tpo": (TPOTrainer, TPOConfig)}
    if kind in pairs:
        trainer, config = pairs[kind]
        data = rows("triples" if kind == "tpo" else "pairs")
        return dress(trainer)(model, args=config("out", **arguments), train_dataset=data, **given)
    trainer, config = (GRPOTrainer, GRPOConfig) if kind == "grpo" else (RLOOTrainer, RLOOConfig)
    arguments = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1, **arguments}

    def reward(completions: list[str], task: list[str], **columns: Any) -> list[float]:
        assert set(task) <= set(TASKS)
        return [float(len(completion)) for completion in completions]

    return dress(trainer)(
        model, reward_funcs=reward, args=config("out", **arguments), train_dataset=rows("prompts"), **given
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("trainer", {}),
        ("sft", {}),
        ("sft", {"gradient_checkpointing": True}),
        ("sft", {"padding_free": True, "max_length": None}),
        ("dpo", {}),
        ("dpo", {"precompute_ref_log_probs": True}),
        ("kto", {}),
        ("grpo", {}),
        ("grpo", {"steps_per_generation": 2, "gradient_accumulation_steps": 1}),  # the model runs on parts of a batch
        ("rloo", {}),
        ("orpo", {}),
        ("cpo", {}),
        ("tpo", {}),
    ],
)
def test_every_row_has_its_task_in_every_forward_pass(kind: str, options: dict[str, Any], seen: Seen) -> None:
    model = watched(adapted(), seen)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    make(kind, model, **options).train()
    moved = [n for n, p in before.items() if not torch.equal(model.get_parameter(n), p)]
    assert any("embedding" in n for n in moved)


def gradient_of_embeddings(kind: str, **options: Any) -> Tensor:
    """In the first step, for a method whose embeddings are trained by the contrastive loss alone."""
    variant = Variant("more", (("selector", "frozen_random"), ("contrastive", 0.1), ("task_dim", 32)))
    model = adapted(variant)
    trainer = make(kind, model, max_grad_norm=0.0, **options)
    found: list[Tensor] = []
    embedding = adapted_layers(model)[0].lora_core["default"].embedding
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: found.append(embedding.grad.clone()))
    trainer.train()
    return found[0]


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo", "orpo"])
def test_accumulated_steps_have_the_auxiliary_loss_of_one_batch(kind: str) -> None:
    whole = gradient_of_embeddings(kind, per_device_train_batch_size=4)
    parts = gradient_of_embeddings(kind, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert whole.abs().max() > 0
    assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_a_trainer_that_generates_trains_the_auxiliary_loss() -> None:
    assert gradient_of_embeddings("grpo").abs().max() > 0


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_the_loss_is_the_trainers_own_plus_the_auxiliary_loss(kind: str) -> None:
    model = adapted()
    ours, theirs = make(kind, model), make(kind, adapted(Variant("more", (("selector", "soft"),))), wrap=False)
    theirs.model.load_state_dict(model.state_dict(), strict=False)
    batch = next(iter(ours.get_train_dataloader()))
    ours.model.train()
    loss = ours.compute_loss(ours.model, dict(batch))
    plain = theirs.compute_loss(theirs.model.train(), dict(batch))
    skip = {"labels", "completion_mask"}
    model.train()(**{k: v for k, v in batch.items() if k not in skip})
    auxiliary = dyads.auxiliary_loss(model)
    assert auxiliary > 0
    assert_close(loss, plain + auxiliary)
    with torch.no_grad():
        assert_close(
            ours.compute_loss(ours.model.eval(), dict(batch)), theirs.compute_loss(theirs.model.eval(), dict(batch))
        )


def test_the_reference_adapter_is_a_copy() -> None:
    model = adapted(Variant("more", (("selector", "soft"),)))
    trainer = make("dpo", model)
    copies = {n for n, _ in model.named_parameters() if ".default." in n}
    assert {n.split(".default.")[-1].split(".")[0] for n in copies} >= {"weight", "embedding", "gate_weight"}
    for name in copies:
        assert torch.equal(model.get_parameter(name), model.get_parameter(name.replace(".default.", ".ref.")))
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.train(), batch)
    assert_close(loss.item(), math.log(2), atol=1e-5, rtol=0)  # policy and reference are equal
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".ref." in n}
    trainer.train()
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())


def test_lora_plus_trains_b_faster() -> None:
    model = adapted(Variant("mode"))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=4.0)
    data = rows("text").map(lambda row: {"input_ids": tokenizer()(row["text"])["input_ids"]}, remove_columns="text")
    trainer = Trainer(
        model,
        TrainingArguments("out", **QUIET | {"max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}),
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        optimizers=(optimizer, None),
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    for part, rate in (("lora_A", 0.5), ("lora_B", 2.0)):
        name = next(n for n in before if part in n)
        assert_close(before[name] - model.get_parameter(name), rate * gradients[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("kind", "of"), [("sft", "sft"), ("orpo", "pairs")])
def test_evaluation_has_the_tasks_too(kind: str, of: str, seen: Seen) -> None:
    trainer = make(kind, watched(adapted(), seen))
    data = rows(of) if kind == "sft" else trainer.train_dataset
    assert math.isfinite(trainer.evaluate(data)["eval_loss"])


def test_rows_without_a_task_are_an_error_where_the_adapter_needs_one() -> None:
    for kind in ("sft", "grpo"):
        trainer = make(kind, adapted())
        trainer.train_dataset = trainer.train_dataset.remove_columns("task")
        with pytest.raises(RoutingError, match="needs"):
            trainer.train()


def test_a_trainer_whose_rows_cannot_be_followed_is_refused_by_name() -> None:
    data = rows("prompts").map(lambda row: {"privileged_context": "w44"})
    arguments = SDFTConfig("out", num_generations=1, max_completion_length=2, distillation_topk=8, **QUIET)
    model = adapted()
    trainer = with_tasks(SDFTTrainer)(model, args=arguments, train_dataset=data, processing_class=tokenizer())
    with pytest.raises(RoutingError, match=r"SDFTTrainer makes its batches out of rows .*dyads\.use_task"):
        trainer.train()
    with dyads.use_task(model, "rte"):
        trainer.train()


def test_trls_packing_drops_the_tasks_loudly() -> None:
    trainer = make("sft", adapted(), packing=True, max_length=16)
    with pytest.raises(RoutingError, match="needs a task"):
        trainer.train()


def test_other_adapters_train_as_before() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    data = rows("text").remove_columns("task")
    with_tasks(SFTTrainer)(model, SFTConfig("out", **QUIET), train_dataset=data, processing_class=tokenizer()).train()
    assert with_tasks(SFTTrainer).__name__ == "SFTTrainer"
    assert issubclass(with_tasks(SFTTrainer), SFTTrainer)


def test_a_peft_config_is_enough(seen: Seen) -> None:
    tiny_model("llama").save_pretrained("base")
    tokenizer().save_pretrained("base")
    config = MORE.config(target_modules=TARGETS["llama"], task_type="CAUSAL_LM")
    arguments = SFTConfig("out", **QUIET)
    trainer = with_tasks(SFTTrainer)("base", arguments, train_dataset=rows("sft"), peft_config=config)
    watched(trainer.model, seen)
    trainer.train()


@pytest.mark.parametrize(
    ("example", "kind"), [("trainer", "text"), ("sft", "sft"), ("dpo", "pairs"), ("grpo", "prompts")]
)
def test_examples(example: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained("base")
    tokenizer().save_pretrained("base")
    answers = {"answer": "w7"} if example == "grpo" else {}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, **answers}) + "\n" for row in rows(kind, count=4)))
    monkeypatch.setattr(sys, "argv", ["example", "base", "rows.jsonl", "out"])
    runpy.run_path(str(EXAMPLES / f"{example}.py"))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "out"))
    assert loaded.peft_config["default"].tasks == sorted({row["task"] for row in rows(kind, count=4)})


def test_the_example_with_vllm_exports_a_lora_for_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Engine:
        """Its answers are the names of the LoRAs that the requests name."""

        def __init__(self, **options: Any) -> None:
            self.options = options

        def generate(self, prompts: list[str], params: Any, lora_request: list[Any]) -> list[Any]:
            for _, number, folder in lora_request:
                config = LoraConfig.from_pretrained(folder)
                assert config.r <= self.options["max_lora_rank"]
                assert not config.rank_pattern
                assert number > 0
            names = [name for name, _, _ in lora_request]
            assert len(names) == len(prompts)
            return [SimpleNamespace(outputs=[SimpleNamespace(text=name)]) for name in names]

    request = SimpleNamespace(LoRARequest=lambda *fields: fields)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Engine, SamplingParams=dict))  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "vllm.lora", SimpleNamespace(request=request))  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)  # type: ignore[misc]
    tiny_model("llama").save_pretrained("base")
    tokenizer().save_pretrained("base")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("sft", count=4)))
    monkeypatch.setattr(sys, "argv", ["example", "base", "rows.jsonl", "out"])
    runpy.run_path(str(EXAMPLES / "serve_vllm.py"))
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.partition(":")[0] for line in lines] == [line.rpartition(" ")[2] for line in lines]
    assert [line.partition(":")[0] for line in lines] == [row["task"] for row in rows("sft", count=4)]
    assert "vllm serve" in (tmp_path / "out" / "loras" / "README.md").read_text()
