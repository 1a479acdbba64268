# SPDX-License-Identifier: Apache-2.0
"""Options beside their plain forms (recipes/parametrisation/options.py): budgets, definitions and verdicts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

FOLDER = Path(__file__).parents[1] / "recipes" / "parametrisation"


@pytest.fixture(scope="module")
def options() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))  # as for a script that is started there
    spec = importlib.util.spec_from_file_location("toy_options", FOLDER / "options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in (spec.name, "toy"):
            sys.modules.pop(name, None)


def test_options_train_as_many_parameters_as_their_plain_forms_at_the_same_rates(options: ModuleType) -> None:
    for pair in options.pairs():
        assert pair.changed.trained(64) == pytest.approx(pair.plain.trained(64), rel=0.015)
        ours, theirs = (form.cell(-5, 64).tuple() for form in (pair.changed, pair.plain))
        if pair.option not in ("frozen A", "√r"):
            assert ours == theirs
        else:
            assert ours != theirs


def layer(options: ModuleType, network: str, variant: int = 1) -> tuple[object, list[torch.Tensor]]:
    toy = options.Toy(d=6, layers=1)
    adapted = getattr(options, network)(options.PLAIN[variant], toy).double()
    core = adapted.cores[0]
    core.reset_parameters()
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3, 6), (core.p, 6), (6, core.q))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return adapted, tensors


def test_gradients_through_square_roots_of_gates_keep_the_values(options: ModuleType) -> None:
    adapted, (x, A, B) = layer(options, "SquareRootGates")
    plain = options.Adapted(options.PLAIN[1], options.Toy(d=6, layers=1)).double()
    plain.load_state_dict(adapted.state_dict())
    task = torch.tensor([0, 1, 2, 3])
    y, expected = adapted.update(0, x, A, B, task), plain.update(0, x, A, B, task)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    dA, dB, dR = torch.autograd.grad(y, [A, B, adapted.cores[0].router], dy)
    with torch.no_grad():
        h = x @ A.T
        root = adapted.cores[0].route(h, x, task).sqrt()
        assert_close(dB, torch.einsum("bto,btq->oq", dy, adapted.cores[0].mix(h, root)))
        dh = (root.flatten(-2) * (dy @ B)).unflatten(-1, root.shape[-2:]).sum(-1)  # every rank has four experts
        assert_close(dA, torch.einsum("btp,btd->pd", dh, x))
    assert_close(dR, torch.autograd.grad(expected, plain.cores[0].router, dy)[0])  # the router's are the usual ones


def test_random_ups_add_nothing_while_gates_are_equal(options: ModuleType) -> None:
    adapted, (x, A, B) = layer(options, "RandomB")
    stacked = {"A0": A.detach().float().expand(2, -1, -1).clone(), "B0": torch.zeros(2, *B.shape)}
    adapted.float().start(stacked)
    torch.nn.init.zeros_(adapted.cores[0].router)
    assert stacked["B0"].any()
    y = adapted.update(0, x.float(), stacked["A0"][0], stacked["B0"][0], torch.tensor([0, 1, 2, 3]))
    assert_close(y, torch.zeros_like(y))


def test_alignment_is_the_mean_symmetric_divergence_of_the_tasks_of_a_batch(options: ModuleType) -> None:
    adapted, (x, A, _) = layer(options, "Aligned", variant=3)
    task = torch.tensor([5, 1, 5, 7])
    of_task = {t: (x[task == t] @ A.T).flatten(0, 1) for t in (1, 5, 7)}
    found = []
    for one, other in combinations(of_task.values(), 2):
        normal = [torch.distributions.Normal(h.mean(0), (h.var(0, correction=0) + 1e-8).sqrt()) for h in (one, other)]
        both = (torch.distributions.kl_divergence(p, q).sum() for p, q in (normal, normal[::-1]))
        found.append(sum(both) / 2)
    assert_close(adapted.auxiliary(0, x, A, task), 0.01 * sum(found) / 3)


def test_an_option_helps_if_both_intervals_are_below_zero(options: ModuleType) -> None:
    pair = next(p for p in options.pairs() if p.option == "align")
    noise = (0.0, 0.001, 0.002)

    def shown(shared: float, best: float) -> str:
        def loss(form: object, k: float, seed: int) -> float:
            if form is pair.plain:
                return {options.SHARED: 1.0}.get(k, 2.0)
            return {options.SHARED: shared + noise[seed], -3: best + noise[seed]}.get(k, 2.0)

        return options.table([pair], loss, 3, 64)

    assert shown(0.9, 0.8).endswith("| helps")
    assert "-9.90 (-10.15 to -9.65) | -19.90 (-20.15 to -19.65) | 2^-3 : 2^-5" in shown(0.9, 0.8)
    assert shown(1.2, 0.8).endswith("| undecided")
    assert shown(1.2, 1.1).endswith("| hurts")


def test_every_option_trains_and_is_read_again(
    options: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = options.pairs()
    some = [next(p for p in every if p.option == o) for o in dict.fromkeys(p.option for p in every)]
    monkeypatch.setattr(options, "pairs", lambda: some)
    monkeypatch.setattr(options, "RATES", (-5,))
    arguments = ["--quick", "--seeds", "2", "--out", str(tmp_path)]
    options.main(arguments)
    first = capsys.readouterr().out
    assert "trainings" in first
    options.main(arguments)
    assert capsys.readouterr().out in first  # the same table, and nothing trained
    rows = [line for line in first.splitlines() if " | " in line and "trainings" not in line]
    assert [row.split(" | ")[0] for row in rows[1:]] == [p.option for p in some]
    assert "+0.00 (" not in first  # no option is without effect
