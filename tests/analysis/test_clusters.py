# SPDX-License-Identifier: Apache-2.0
"""Clusters of ranks in hand-made LoRAs: silhouettes by definition, principal components, intervals, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from dyads.analysis.clusters import clusters
from dyads.cli import main
from dyads.errors import RunError
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from made_adapters import save_adapter
from made_runs import recipe_of
from tiny import Variant, tiny_model

RANK = 3


def lora(folder: Path, spread: float, *, rank: int = RANK, zero: bool = False) -> Path:
    """A LoRA whose a_j are those of a common start plus noise, and whose b_j are noise."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                start = torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.shape[1]))
                weight.copy_(start + spread * torch.randn(weight.shape))
            elif "lora_B" in name:
                weight.zero_() if zero else weight.normal_()
    model.save_pretrained(folder)
    return folder


def by_definition(vectors: np.ndarray) -> float:
    """Mean silhouette of (adapter rank feature), with distance 1 - cosine."""
    v = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    n, r, _ = v.shape
    found = []
    for i in range(n):
        for j in range(r):
            distance = 1 - v @ v[i, j]
            alpha = distance[:, j].sum() / (n - 1)
            beta = min(distance[:, other].mean() for other in range(r) if other != j)
            found.append((beta - alpha) / max(alpha, beta))
    return float(np.mean(found))


def test_down_vectors_near_their_start_cluster_by_rank_and_random_up_vectors_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folders = [lora(tmp_path / f"task{i}", 0.1) for i in range(4)]
    found = clusters(folders)
    assert found.silhouette.names == ("side", "seed", "layer")
    down, up = (found.silhouette.at(side=side).values for side in ("down", "up"))
    assert down.min() > 0.9
    assert np.abs(up.mean()) < 0.2
    assert found.notes == ("with one seed there is no interval: it would be over starts",)
    assert found.tables[0].rows[0][0] == "all layers"


def test_silhouettes_and_components_are_those_of_the_definition(tmp_path: Path) -> None:
    from dyads.runs.saved import SavedAdapter

    torch.manual_seed(1)
    folders = {f"task {i}": lora(tmp_path / str(i), 0.7) for i in range(3)}
    found = clusters(folders)
    read = [SavedAdapter.read(folder) for folder in folders.values()]
    for n, layer in enumerate(read[0].layers):
        for side in ("down", "up"):
            of = [x.layers[n].A if side == "down" else x.layers[n].B.T for x in read]  # type: ignore[union-attr]
            vectors = torch.stack(of).double().numpy()  # type: ignore[arg-type]
            expected = by_definition(vectors)
            assert found.silhouette.at(side=side, layer=layer.module).values == pytest.approx([expected])
            unit = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).reshape(9, -1)
            at = found.components.at(side=side, layer=layer.module).values.reshape(9, 3)
            share = found.explained.at(side=side, layer=layer.module).values
            centred = unit - unit.mean(axis=0)
            assert at.var(axis=0) / centred.var(axis=0).sum() == pytest.approx(share)
            assert at.T @ at == pytest.approx(np.diag((at**2).sum(axis=0)), abs=1e-9)


def test_up_vectors_of_zero_have_no_silhouette(tmp_path: Path) -> None:
    folders = [lora(tmp_path / str(i), 0.1, zero=True) for i in range(2)]
    found = clusters(folders)
    assert np.isnan(found.silhouette.at(side="up").values).all()
    assert found.tables[0].rows[0][2:] == ("–", "–")


def test_adapters_of_another_form_are_refused(tmp_path: Path) -> None:
    first, narrow = lora(tmp_path / "a", 0.1), lora(tmp_path / "b", 0.1, rank=2)
    with pytest.raises(RunError, match="'b' has other layers or another rank than 'a'; compare LoRAs of one form"):
        clusters([first, narrow])
    mixture = save_adapter(tmp_path / "c", Variant("mode"), lambda core, A, B: None)
    with pytest.raises(RunError, match=r"'c' is no LoRA of linear layers \(mode\); clusters are those of LoRAs"):
        clusters([first, mixture])


def test_seeds_are_those_of_the_recipes_and_give_the_interval(tmp_path: Path) -> None:
    torch.manual_seed(3)
    runs = []
    for seed in (0, 1, 2):
        for task in "ab":
            run = RunFolder.create(tmp_path / f"{task}{seed}", recipe_of("LoRA", method="lora", seed=seed))
            lora(run.adapter, 0.1 + 0.1 * seed)
            accept(run.path)
            runs.append(run.path)
    found = clusters(runs)
    assert found.silhouette.axes["seed"] == ("0", "1", "2")
    of_seeds = found.silhouette.at(side="down").mean("layer").values
    half = 4.302652729749464 * of_seeds.std(ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    mean = of_seeds.mean()
    assert found.tables[0].rows[0][1] == f"{mean:.2f} ({mean - half:.2f} to {mean + half:.2f})"
    with pytest.raises(RunError, match="seed 2 has one LoRA, a2; give two or more that started alike"):
        clusters(runs[:-1])


def test_a_rank_of_one_and_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the LoRAs have rank 1: a single rank has no clusters"):
        clusters([lora(tmp_path / name, 0.1, rank=1) for name in "ab"])
    same = [lora(tmp_path / name / "adapter", 0.1) for name in "cd"]
    with pytest.raises(RunError, match="two of the adapters have the same folder name"):
        clusters(same)


def test_the_verb_reads_several_adapters_and_other_questions_read_one(tmp_path: Path) -> None:
    torch.manual_seed(2)
    folders = [str(lora(tmp_path / f"task{i}", 0.1)) for i in range(2)]
    done = CliRunner().invoke(main, ["inspect", *folders, "--what", "clusters", "--format", "json"])
    content = json.loads(done.output)
    assert content["arrays"]["components"]["axes"]["adapter"] == ["task0", "task1"]
    shown = CliRunner().invoke(main, ["inspect", *folders, "--what", "clusters"])
    assert "clusters of 2 runs" in shown.output
    one = CliRunner().invoke(main, ["inspect", folders[0], "--what", "clusters"])
    assert "give two runs or more" in one.output
    several = CliRunner().invoke(main, ["inspect", *folders])
    assert "--what summary is about one run, and 2 are given" in several.output
