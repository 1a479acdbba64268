# SPDX-License-Identifier: Apache-2.0
"""Experts of tokens, costs, and scores alone and together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dyads.analysis.cost import cost
from dyads.analysis.gates import Reader, gates_of
from dyads.analysis.interference import interference
from dyads.analysis.tokens import token_experts
from dyads.comparing.comparison import compare
from dyads.errors import RunError
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from made_adapters import choose_experts, save_adapter
from tiny import Variant


def test_the_tokens_of_an_instance_average_to_the_gates_of_its_task(trained: Callable[..., RunFolder]) -> None:
    folder = trained("mode")
    reader = Reader(folder)
    task = reader.tasks[0]
    example = reader.examples(task)[0]
    found = token_experts(folder, task.name, example.id)
    assert found.weights.names == ("token", "layer", "choice", "expert")
    assert found.instance == example.id
    assert len(found.texts) == len(found.weights.axes["token"])
    for word in (example.prompt.split()[1], example.references[0].split()[-1]):
        assert word in found.texts
    assert np.allclose(found.weights.values.sum(-1), 1)
    means = gates_of(folder, instances=1).weights.at(task=task.name)
    assert np.allclose(found.weights.mean("token").values, means.values, atol=1e-6)
    layer = found.weights.axes["layer"][0]
    expert, weight = found.most(layer)[0]
    first = found.weights.values[0, 0].mean(0)
    assert (expert, weight) == (first.argmax(), pytest.approx(first.max()))


def test_the_encoders_layers_show_the_tokens_of_an_encoder_decoder(trained: Callable[..., RunFolder]) -> None:
    found = token_experts(trained("molora", "t5"))
    assert all("encoder" in name.split(".") for name in found.weights.axes["layer"])
    assert found.notes == ("the decoder's layers are left out",)


def test_unknown_tasks_and_instances_are_refused_with_what_there_is(trained: Callable[..., RunFolder]) -> None:
    folder = trained("mode")
    with pytest.raises(RunError, match="has no task 'frist_word' – did you mean 'first_word'"):
        token_experts(folder, "frist_word")
    with pytest.raises(RunError, match="task 'first_word' has no instance 'none'"):
        token_experts(folder, "first_word", "none")
    with pytest.raises(RunError, match="all tokens use the same experts"):
        token_experts(trained("more"))


def test_costs_add_up_to_the_adapter(tmp_path: Path) -> None:
    found = cost(save_adapter(tmp_path, Variant("mode"), lambda core, A, B: None))
    adapter = SavedAdapter.read(tmp_path)
    assert found.parameters.values.sum() == adapter.parameters
    layer = found.parameters.axes["layer"][1]
    assert "q_proj" in layer  # 32 → 32 features, r = 4, 3 experts
    assert found.parameters.at(layer=layer).values.tolist() == [4 * 32, 12 * 32, 12 * 32, 0]
    assert found.products.at(layer=layer).values.tolist() == [4 * 32, 12 * 32, 12 * 32, 32 * 32]
    assert found.memory.at(kind="optimizer").item() == 8 * adapter.parameters
    assert np.isnan(found.seconds.values).all()
    assert np.isnan(found.memory.at(kind="peak of the training").item())


def test_embeddings_are_a_part_of_their_own(tmp_path: Path) -> None:
    moelora = Variant("moelora", (("r", 6), ("num_experts", 3), ("task_dim", 5)))
    found = cost(save_adapter(tmp_path, moelora, choose_experts(0, 0, 0)))
    assert (found.parameters.at(part="embedding").values == 3 * 5).all()
    assert (found.parameters.at(part="router").values == 3 * 5).all()


def test_a_run_has_times_and_its_peak_memory(trained: Callable[..., RunFolder]) -> None:
    folder = trained("mode")
    found = cost(folder)
    assert found.seconds.at(phase="training").item() == pytest.approx(3 * found.seconds.at(phase="one step").item())
    assert found.seconds.at(phase="scoring").item() == folder.scores()["seconds"]["evaluate"]
    assert found.memory.at(kind="peak of the training").item() > 2**20


def test_scores_alone_and_together_are_compared_instance_by_instance(run: Callable[..., Path]) -> None:
    mixture = run("all", {"a": [40, 60, 50, 30], "b": [10, 20, 30, 50]})
    alone = run("a only", {"a": [49, 71, 61, 39]})
    adapted = run("later", {"a": [40, 60, 50, 30], "b": [0, 20, 20, 45]})
    found = interference([mixture], {"a": [alone]}, [adapted])
    assert found.scores.names == ("setting", "task")
    assert found.scores.axes["setting"] == ("mixture", "alone", "adapted")
    assert found.scores.at(setting="alone").values.tolist() == [55, pytest.approx(np.nan, nan_ok=True)]
    gap = found.differences.at(setting="alone", task="a")
    half = stats.t.ppf(0.975, 3) * np.std([9, 11, 11, 9], ddof=1) / 2  # the gains of the instances
    assert gap.values.tolist() == pytest.approx([10, 10 - half, 10 + half])
    value, low, high = found.differences.at(setting="adapted", task="b").values
    assert value == pytest.approx(-6.25)
    assert low < value < high
    assert np.isnan(found.differences.at(setting="alone", task="b").values).all()
    assert "one seed" in found.notes[0]


def test_the_mean_over_tasks_is_the_difference_of_the_comparison(run: Callable[..., Path]) -> None:
    values = {0: {"a": [40, 60, 50, 30], "b": [10, 20, 30, 50]}, 1: {"a": [50, 60, 70, 30], "b": [20, 20, 30, 60]}}
    mixture = [run("all", of, seed=seed) for seed, of in values.items()]
    changed = {
        seed: {"a": [x + 9 for x in of["a"]], "b": [x - 3 * seed for x in of["b"]]} for seed, of in values.items()
    }
    alone = [run(f"{task} alone", {task: of[task]}, seed=seed) for task in ("a", "b") for seed, of in changed.items()]
    found = interference(mixture, alone)
    together = [run("together", of, seed=seed) for seed, of in changed.items()]
    gap = compare([*mixture, *together]).pair("together", "all").macro
    assert found.mean.at(setting="alone").values.tolist() == pytest.approx([gap.value, gap.low, gap.high])
    assert found.mean.at(setting="alone").values[0] == pytest.approx((9 - 1.5) / 2)
    (table,) = found.tables
    assert table.rows[-1][0] == "mean of 2 tasks"
    unlike = interference(mixture, [*alone, run("a alone", {"a": [1, 2, 3, 4]}, seed=2)])
    assert np.isnan(unlike.mean.values).all()
    assert unlike.tables[0].rows[-1][-1] == "–"


def test_runs_that_are_no_seeds_of_one_recipe_are_not_pooled(run: Callable[..., Path]) -> None:
    values = {"a": [40, 60, 50, 30], "b": [10, 20, 30, 50]}
    mixture, alone = run("all", values), run("a alone", {"a": [50, 70, 60, 40]})
    with pytest.raises(RunError, match=r"would be seeds of one setting of task 'a', but they differ in method\.name"):
        interference([mixture, run("other", values, method="lora", seed=1)], [alone])
    with pytest.raises(RunError, match=r"of task 'a', but both have seed 0: give the runs of one method"):
        interference([mixture], [alone, alone])


def test_scores_of_other_instances_are_refused(run: Callable[..., Path]) -> None:
    mixture = run("all", {"a": [40, 60, 50, 30]})
    with pytest.raises(RunError, match=r"was scored otherwise .*\(instances differ\)"):
        interference([mixture], {"a": [run("short", {"a": [50, 70]})]})
    changed = run("other", {"a": [40, 60, 50, 30]}, changed={"a": {"fingerprint": "x"}})
    with pytest.raises(RunError, match=r"\(fingerprint differ\)"):
        interference([mixture], {"a": [changed]})
    with pytest.raises(RunError, match="give scored runs"):
        interference([mixture])
