# SPDX-License-Identifier: Apache-2.0
"""Rows with different adapters in one forward pass answer as each adapter's own model does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from dyads.errors import RoutingError
from dyads.tuner.row_adapters import RowAdapters
from tiny import TARGETS, TASKS, VARIANTS, Variant, batch, tiny_model


def adapted(base: PreTrainedModel, variant: Variant | None, **options: object) -> PeftModel:
    targets = TARGETS["llama"][:2] if variant is None else TARGETS["llama"]
    if variant is None:
        options = {"init_lora_weights": False, **options}
        config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)  # type: ignore[arg-type]
    else:
        config = variant.config(target_modules=targets, init_weights=False)
    return get_peft_model(copy.deepcopy(base), config).eval()


def logits(model: nn.Module, ids: Tensor, **task: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **task).logits
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
def test_every_row_has_its_adapter_and_task(variant: Variant) -> None:
    base = tiny_model("llama", torch.float64).eval()
    ids = batch("llama", rows=6)["input_ids"]
    one, lora = adapted(base, variant), adapted(base, None)
    needs = variant.config().task_names is not None
    tasks = [TASKS[2], None, TASKS[0], None, TASKS[1], None]
    expected = [
        logits(one, ids[i : i + 1], **({"task": [tasks[i]]} if needs else {})) if i % 2 == 0
        else logits(lora if i == 1 else base, ids[i : i + 1])
        for i in range(6)
    ]  # fmt: skip
    mixed = RowAdapters(copy.deepcopy(base))
    assert mixed.take("one", one)
    assert mixed.take("two", lora)
    names = ["one", "two", "one", None, "one", None]
    with mixed.use(names, tasks):
        assert_close(logits(mixed.model, ids), torch.cat(expected), rtol=1e-9, atol=1e-9)
    with mixed.routing.unchanged_weights(), mixed.use(names, tasks):
        for _ in range(2):  # the second call reads what the first kept
            assert_close(logits(mixed.model, ids), torch.cat(expected), rtol=1e-9, atol=1e-9)
    with mixed.use(["two"] * 6, [None] * 6):
        assert_close(logits(mixed.model, ids)[1:2], expected[1], rtol=1e-9, atol=1e-9)


def test_adapters_that_do_more_than_add_to_linear_layers_are_not_taken() -> None:
    base = tiny_model("llama").eval()
    mixed = RowAdapters(copy.deepcopy(base))
    before = str(mixed.model)
    for options in (
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ):
        assert not mixed.take("a", adapted(base, None, **options))
    assert str(mixed.model) == before


def test_adapters_of_layers_that_see_all_tokens_on_one_axis_are_not_taken() -> None:
    base = tiny_model("opt")
    mixed = RowAdapters(copy.deepcopy(base))
    before = str(mixed.model)
    for targets, taken in ((["q_proj", "fc1"], False), (["fc2"], False), (["q_proj", "v_proj"], True)):
        for config in (LoraConfig(target_modules=targets), Variant("more").config(target_modules=targets)):
            other = get_peft_model(copy.deepcopy(base), config).eval()
            hooks = [len(module._forward_pre_hooks) for module in other.modules()]
            assert mixed.take("a", other) is taken
            assert (str(mixed.model) == before) is not taken
            assert [len(module._forward_pre_hooks) for module in other.modules()] == hooks
            mixed = RowAdapters(copy.deepcopy(base))


def test_a_layer_that_does_not_see_the_rows_is_refused() -> None:
    base = tiny_model("llama").eval()
    mixed = RowAdapters(copy.deepcopy(base))
    mixed.take("a", adapted(base, None))
    ids = batch("llama", rows=4)["input_ids"]
    with mixed.use(["a", None], [None, None]), pytest.raises(RoutingError, match=r"in a batch of 2 rows"):
        logits(mixed.model, ids)
    with mixed.use(["a", None, None, None], [None] * 4):
        logits(mixed.model, ids)
