# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests of models, with the configs of dyads: `PYTHONPATH=src:tests python -m doors.peft_suite CHECKOUT`.

CHECKOUT is a clone of PEFT of the installed version. The lists of cases in copies of two of its test files are
replaced; the models are tiny and built here, so nothing is downloaded. Prints what failed, by message.
docs/compatibility.md has the outcome.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tiny import Variant

METHODS = [
    *(Variant(key) for key in ("comol", "hmora", "hydralora", "mode", "moelora", "molora", "more", "mtl_lora", "poly")),
    *(Variant(key) for key in ("smora", "task_mode")),
    Variant("mode", (("num_experts", 1),)),
]
TARGETS: list[dict[str, Any]] = [
    {"target_modules": "lin0"},
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin1"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
]


def options(variant: Variant, **more: Any) -> tuple[type, dict[str, Any]]:
    """A config class and its options; one task, so that calls without `task=` are answered."""
    one = {"tasks": ["only"]} if variant.config().task_names else {}
    config = variant.config(**one)
    small = {key: value for key, value in vars(config).items() if key in ("num_experts", "r", "top_k", "task_dim")}
    return type(config), {**small, **dict(variant.options), **one, **more}


MLP_CASES = [
    (f"dyads {variant.id} {number}", "MLP", *options(variant, lora_dropout=0.0, **targets))
    for variant in METHODS
    for number, targets in enumerate(TARGETS)
]
DECODER_CASES = [options(variant, task_type="CAUSAL_LM", lora_dropout=0.0) for variant in METHODS]


def models(folder: Path) -> list[str]:
    """Folders of tiny models; PEFT's tests know them by the name of the class in the path."""
    common = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {
        "tiny-random-OPTForCausalLM": OPTForCausalLM(
            OPTConfig(**common, **sizes, ffn_dim=32, word_embed_proj_dim=32, max_position_embeddings=128)
        ),
        "tiny-random-GPT2LMHeadModel": GPT2LMHeadModel(GPT2Config(**common, n_embd=32, n_layer=2, n_head=4)),
        "tiny-random-LlamaForCausalLM": LlamaForCausalLM(LlamaConfig(**common, **sizes, intermediate_size=44)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return [str(folder / name) for name in made]


class Outcomes:
    """Counts of outcomes, and the messages of failures by test."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.messages: Counter[tuple[str, str]] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message.splitlines()[0] if crash else str(report.longrepr).splitlines()[-1]
            self.messages[report.nodeid.split("::")[-1].split("[")[0], message[:160]] += 1


def without_diffusers() -> None:
    """A module in the place of diffusers, which the tests import for models that are not used here."""
    if importlib.util.find_spec("diffusers") is None:
        module = types.ModuleType("diffusers")
        module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
        module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = module


def main(checkout: Path, which: str, *more: str) -> None:
    without_diffusers()
    tests = checkout / "tests"
    names = models(checkout / "models")
    source = (tests / f"test_{which}_models.py").read_text("utf-8")
    ours = "from doors.peft_suite import {} as {}\n"
    if which == "custom":
        source = re.sub(r"^TEST_CASES = \[.*?^\]\n", ours.format("MLP_CASES", "TEST_CASES"), source, flags=re.M | re.S)
    else:
        source = re.sub(
            r"^ALL_CONFIGS = \[.*?^\]\n", ours.format("DECODER_CASES", "ALL_CONFIGS"), source, flags=re.M | re.S
        )
        source = re.sub(
            r"^PEFT_DECODER_MODELS_TO_TEST = \[.*?^\]\n",
            f"PEFT_DECODER_MODELS_TO_TEST = {names}\n",
            source,
            flags=re.M | re.S,
        )
    (tests / f"test_other_cases_{which}.py").write_text(source, "utf-8")
    outcomes = Outcomes()
    only = (
        ["-k", "TestPeftCustomModel and dyads"] if which == "custom" else ["-k", "TestDecoderModels and config_kwargs"]
    )
    pytest.main(
        [
            str(tests / f"test_other_cases_{which}.py"),
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            "-W",
            "ignore",
            f"--rootdir={checkout}",
            *only,
            *more,
        ],
        [outcomes],
    )
    print(dict(outcomes.counts))
    for (test, message), count in sorted(outcomes.messages.items()):
        print(f"{count:4}  {test}: {message}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
