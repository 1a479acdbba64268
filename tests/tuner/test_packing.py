# SPDX-License-Identifier: Apache-2.0
"""Packed sequences: the results of each sequence alone, also for losses on samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

import dyads
from dyads.errors import RoutingError
from dyads.tuner.packing import Packing
from tiny import TARGETS, VARIANTS, Variant, task_of, tiny_model

LENGTHS = (5, 1, 7)
ORDER = ("sst2", "rte", "cola")
ROUTED = [v for v in VARIANTS if "task" in v.looks_at]
routed = pytest.mark.parametrize("variant", ROUTED, ids=lambda v: v.id)
LOSSES = [
    Variant("more", (("contrastive", 0.1),)),
    Variant("more", (("contrastive", 0.2), ("task_dim", 5), ("contrastive_pool", "last"))),
    Variant("task_mode", (("contrastive", 0.1), ("load_balance", 0.3))),
    Variant("hmora", (("divergence", 0.1),)),
    Variant("mode", (("load_balance", 0.1),)),
]


def adapted(variant: Variant, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    options = {"target_modules": TARGETS["llama"], "init_weights": False, "lora_dropout": 0.0, **options}
    model = get_peft_model(tiny_model("llama"), variant.config(**options))
    model.config.use_cache = False
    return model


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 61, (length,), generator=generator) for length in LENGTHS]


def padded() -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(sequences(), batch_first=True)
    mask = torch.tensor([[int(place < length) for place in range(max(LENGTHS))] for length in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def positions(padding: int = 0) -> Tensor:
    return torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(padding, dtype=torch.long)])[None]


def packed(form: str = "position_ids") -> dict[str, Any]:
    """The same in one row; the label of a first token is never predicted."""
    ids = torch.cat(sequences())[None]
    given: dict[str, Any] = {"input_ids": ids, "labels": ids.masked_fill(positions() == 0, -100)}
    given["position_ids"] = positions()  # which the attention needs in any case
    if form.startswith("cu_seq_lens"):
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        given |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        given |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    return given


def tasks(variant: Variant, form: str) -> dict[str, Any]:
    found = task_of(variant.config(), *ORDER)
    if form == "tokens" and found:
        ids = torch.tensor([2, 0, 1])
        return {"task": ids.repeat_interleave(torch.tensor(LENGTHS))[None]}
    return found


def of_sequences(x: Tensor, *, is_packed: bool) -> list[Tensor]:
    if is_packed:
        return list(x[0].split(LENGTHS))
    return [x[row, :length] for row, length in enumerate(LENGTHS)]


def step(model: PeftModel, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    model(**given).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@routed
def test_packed_sequences_have_the_outputs_and_gradients_of_a_padded_batch(variant: Variant) -> None:
    model = adapted(variant).train()
    alike = {**padded(), **tasks(variant, "rows")}
    with torch.no_grad():
        expected = of_sequences(model(**alike).logits, is_packed=False)
    gradients = step(model, alike)
    for form in ("position_ids", "cu_seq_lens", "tokens"):
        given = {**packed(form), **tasks(variant, form)}
        with torch.no_grad():
            found = of_sequences(model(**given).logits, is_packed=True)
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert_close(step(model, given), gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lossy", LOSSES, ids=lambda v: v.id)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_auxiliary_losses_are_those_of_a_padded_batch(lossy: Variant, checkpointed: bool) -> None:
    model = adapted(lossy).train()
    if checkpointed:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    alike = {**padded(), **tasks(lossy, "rows")}
    model(**{k: v for k, v in alike.items() if k != "labels"})
    expected = dyads.auxiliary_loss(model)
    assert expected > 0
    gradients = step(model, alike)
    for form in ("position_ids", "cu_seq_lens"):
        given = {**packed(form), **tasks(lossy, "rows")}
        model(**{k: v for k, v in given.items() if k != "labels"})
        assert_close(dyads.auxiliary_loss(model), expected)
        assert_close(step(model, given), gradients, atol=1e-5, rtol=1e-4)


def test_padding_at_the_end_belongs_to_no_sequence() -> None:
    lossy = LOSSES[2]
    model = adapted(lossy).train()
    model(**{k: v for k, v in packed().items() if k != "labels"}, task=list(ORDER))
    expected = dyads.auxiliary_loss(model)
    ids = torch.cat([*sequences(), torch.zeros(3, dtype=torch.long)])[None]
    model(input_ids=ids, position_ids=positions(padding=3), task=list(ORDER))
    assert_close(dyads.auxiliary_loss(model), expected)


def test_several_rows_of_packed_sequences() -> None:
    variant = Variant("more", (("contrastive", 0.1),))
    model = adapted(variant).train()
    rows = {k: torch.cat([v, v.flip(0)]) for k, v in packed().items()}
    model(**rows, task=[*ORDER, *ORDER]).loss.backward()
    with pytest.raises(RoutingError, match="task has 4 entries, and the batch holds 6 packed sequences"):
        model(**rows, task=["rte"] * 4)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (["rte", "cola"], "task has 2 entries, and the batch holds 3 packed sequences"),
        (["rte"] * 4, "task has 4 entries, and the batch holds 3 packed sequences"),
        (torch.zeros(1, 12, dtype=torch.long), r"task has shape \(1, 12\) for a batch of shape \(1, 13\)"),
        (torch.zeros(1, 1, 13, dtype=torch.long), r"shape \(batch,\), or \(batch, tokens\)"),
        (torch.full((1, 13), 3), "does not know task 3"),
        (["rte", "cola", "mnli"], "does not know task 'mnli'"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(task: Any, message: str) -> None:
    model = adapted(Variant("more"))
    with pytest.raises(RoutingError, match=message):
        model(**packed(), task=task)


def test_three_tasks_for_six_rows_with_positions_are_refused_as_before() -> None:
    rows = {"input_ids": torch.randint(3, 61, (6, 4)), "position_ids": torch.arange(4).expand(6, 4)}
    with pytest.raises(RoutingError, match="task has 3 entries, and the batch holds 6 packed sequences"):
        adapted(Variant("more"))(**rows, task=list(ORDER))


def test_samples_need_their_beginnings_and_generate_needs_rows() -> None:
    model = adapted(Variant("more", (("contrastive", 0.1),))).train()
    of_tokens = tasks(Variant("more"), "tokens")
    with pytest.raises(RoutingError, match="does not say where samples begin: give one for every packed sequence"):
        model(**packed(), **of_tokens)
    with pytest.raises(RoutingError, match="generate needs one task for every row"):
        model.generate(input_ids=packed()["input_ids"], **of_tokens, max_new_tokens=2)
    model.eval()(**packed(), **of_tokens)


def test_a_layer_that_sees_other_tokens_is_refused() -> None:
    layer = adapted(Variant("more")).base_model.model.model.layers[0].self_attn.q_proj
    with dyads.use_task(layer, torch.zeros(2, 3, dtype=torch.long)):
        layer.routing.here.current = None
        assert layer(torch.randn(2, 3, 32)).shape == (2, 3, 32)
        with pytest.raises(RoutingError, match=r"input of shape \(3, 2, 32\) in a batch of \(2, 3\) tokens"):
            layer(torch.randn(3, 2, 32))


def test_unpacked_is_differentiable_and_leaves_padding_zero() -> None:
    packing = Packing.of_call({"position_ids": positions(padding=2)}, 1, 15, 3)
    assert packing is not None
    x = torch.randn(15, 4, requires_grad=True)
    unpacked = packing.unpacked(x)
    assert unpacked.shape == (3, 7, 4)
    for row, (length, part) in enumerate(zip(LENGTHS, x[:13].split(LENGTHS), strict=True)):
        assert torch.equal(unpacked[row, :length], part)
        assert not unpacked[row, length:].any()
    unpacked.sum().backward()
    assert torch.equal(x.grad, torch.cat([torch.ones(13, 4), torch.zeros(2, 4)]))
