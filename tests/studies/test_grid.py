# SPDX-License-Identifier: Apache-2.0
"""Study files: their grids, and mistakes in them with the line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dyads.errors import ConfigError, DyadsError
from dyads.recipe.load import load_recipe
from dyads.runs.folder import RunFolder
from dyads.studies.grid import Study, load_study
from dyads.studies.parameters import scored_names, task_names
from dyads.studies.spec import study_keys
from dyads.studies.verdicts import claims_of
from made_runs import write_sni
from made_studies import LORA, MODE, TARGETS, Write

ROOT = Path(__file__).parents[2]
MAJORITY = {"method": {"name": "majority"}}


def names(study: Study) -> list[str]:
    return list(dict.fromkeys(cell.name for cell in study.cells().values()))


def test_a_grid_is_every_combination_seed_by_seed(write: Write) -> None:
    study = load_study(write())
    assert names(study) == ["LoRA-4-seed0", "MoDE-2x2-seed0", "LoRA-4-seed1", "MoDE-2x2-seed1"]
    cells = list(study.cells().values())
    assert [(cell.label, cell.recipe.seed, cell.steps) for cell in cells[1:3]] == [("MoDE 2x2", 0, 6), ("LoRA 4", 1, 6)]
    assert cells[1].recipe.method.options == {"r": 2, "num_experts": 2, "target_modules": TARGETS}
    assert study.table_axes == ()


def test_a_cell_is_the_recipe_that_the_same_overrides_make(write: Write, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("name: b\nmodel: {name: tiny}\nmethod: {name: mode, r: 2}\ntasks: {family: starter}\n")
    axes = {
        "train.learning_rate": [1e-3, 0.01],
        "size": {"small": None, "large": {"method.r": 8, "train": {"steps": 3}}},
    }
    study = load_study(write(recipe="base.yaml", vary=axes, claims=None), ["train.batch_size=4"])
    cell = list(study.cells().values())[-1]
    wanted = load_recipe(
        base,
        [
            "name=learning_rate 0.01, large",
            "train.learning_rate=0.01",
            "method.r=8",
            "train.steps=3",
            "train.batch_size=4",
        ],
        check=False,
    )
    assert (cell.name, cell.recipe) == ("learning_rate0.01-large", wanted)


def test_a_value_may_be_a_recipe_of_its_own(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("name: other\nmethod: {name: lora, r: 3}\n")
    study = load_study(write(vary={"method": {"mine": "other.yaml"}}, claims=None))
    (cell,) = study.cells().values()
    assert (cell.label, cell.recipe.method.options) == ("mine", {"r": 3})


def test_methods_that_train_nothing_run_once(write: Write) -> None:
    vary = {
        "method": {"most frequent": MAJORITY, "MoDE": MODE},
        "size": {"small": {"method": {"r": 2}}, "large": {"method": {"r": 4}}},
        "train.steps": [2, 4],
        "seed": [0, 1],
    }
    study = load_study(write(vary=vary, claims=None))
    assert len(study.combinations) == 16
    assert len(names(study)) == 1 + 8
    majority = next(cell for cell in study.cells().values() if cell.name == "most-frequent")
    assert (majority.label, majority.steps) == ("most frequent", 0)
    assert "MoDE, large, steps 4" in {cell.label for cell in study.cells().values()}


def test_what_trains_nothing_runs_again_where_its_prompts_are_cut_elsewhere(write: Write) -> None:
    vary = {"method": {"zero": {"method": {"name": "zero-shot"}}}, "train.max_prompt_tokens": [16, 64], "seed": [0, 1]}
    study = load_study(write(vary=vary, claims=None))
    assert {cell.name: cell.recipe.train.max_prompt_tokens for cell in study.cells().values()} == {
        "zero-max_prompt_tokens16": 16,
        "zero-max_prompt_tokens64": 64,
    }


def test_only_and_without_choose_combinations(write: Write) -> None:
    vary = {"method": {"a": LORA, "b": MODE}, "train.steps": [2, 4], "seed": [0, 1]}
    study = load_study(write(vary=vary, claims=None, without=[{"method": "b", "train.steps": [2], "seed": 1}]))
    assert len(names(study)) == 7
    study = load_study(write(vary=vary, claims=None, only=[{"method": "b", "seed": 1}, {"train.steps": 4, "seed": 0}]))
    assert names(study) == ["a-steps4-seed0", "b-steps4-seed0", "b-steps2-seed1", "b-steps4-seed1"]


def test_single_combinations_can_be_adjusted(write: Write) -> None:
    vary = {"method": {"a": LORA, "b": MODE}, "size": {"small": None, "large": None}, "seed": [0, 1]}
    adjust = [
        {"where": {"size": "small"}, "recipe": {"method.r": 1}},
        {"where": {"method": "b", "size": ["small"]}, "recipe": {"method": {"num_experts": 3}}},
        {"where": {"method": "a", "size": "large"}, "recipe": {"method": {"r": 9}}},
    ]
    study = load_study(write(vary=vary, claims=None, adjust=adjust))
    found = {cell.label: cell.recipe.method.options for cell in study.cells().values()}
    assert {label: (o["r"], o.get("num_experts")) for label, o in found.items()} == {
        "a, small": (1, None),
        "b, small": (1, 3),
        "a, large": (9, None),
        "b, large": (2, 2),
    }


def test_axes_that_change_what_is_scored_have_a_table_for_each_value(write: Write) -> None:
    few = {"tasks": {"names": ["first_word"]}}
    vary = {"method": {"a": LORA, "b": MODE}, "suite": {"three": None, "one": few}, "size": {"x": None}, "seed": [0]}
    study = load_study(write(vary=vary, tables=["size"], claims=[{"ahead": "b", "of": "a", "on": "micro"}]))
    assert study.table_axes == ("suite", "size")
    cells = study.cells()
    assert {cell.label for cell in cells.values()} == {"a", "b"}
    assert [claim.text for claim in claims_of(study, cells)] == [
        "b ahead of a on micro (suite three, size x)",
        "b ahead of a on micro (suite one, size x)",
    ]


def test_a_claim_is_decided_for_each_combination_of_the_other_axes(write: Write) -> None:
    vary = {"method": {"a": LORA, "b": MODE}, "train.steps": [2, 4], "seed": [0, 1]}
    claims = [{"ahead": "b", "of": "a"}, {"equal": "b", "to": "a", "within": 1, "where": {"train.steps": 4}}]
    study = load_study(write(vary=vary, claims=claims))
    found = claims_of(study, study.cells())
    assert [(c.row, c.column, len(c.runs)) for c in found] == [
        ("b, steps 2", "a, steps 2", 4),
        ("b, steps 4", "a, steps 4", 4),
        ("b, steps 4", "a, steps 4", 4),
    ]


def claims_in(path: Path) -> None:
    study = load_study(path)
    claims_of(study, study.cells())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"vary": {"seeds": [0]}}, r"study.yaml:\d+: unknown key 'seeds' – did you mean 'seed'?"),
        ({"vary": {"seed": [0, 0]}}, "'seed' has the value 0 twice"),
        ({"vary": {"seed": [-1]}}, r"study.yaml:\d+: 'seed' must be at least 0, got -1"),
        ({"vary": {"seed": []}}, r"axis 'seed' must be a list of values or named sections of overrides"),
        ({"vary": {"a": {"x": 3}}}, r"study.yaml:\d+: 'a.x' must be a section of overrides or the path of a recipe"),
        ({"vary": {"a": {"x": {"name": "y"}}}}, "'a.x' sets 'name', but runs are named by their values: drop it"),
        ({"vary": {"a": {"x y": LORA, "x-y": MODE}}, "claims": []}, "two cells would have the folder 'x-y'"),
        (
            {"vary": {"a": {"x": {"train.stepz": 3}}}},
            r"study.yaml:\d+: unknown key 'train.stepz' – did you mean 'steps'",
        ),
        ({"vary": {"a": {"x": "no.yaml"}}}, "there is no recipe at '.*no.yaml'"),
        ({"vary": {"tasks.names": [["a"]]}}, "the values of 'tasks.names' are no scalars: name them"),
        ({"recipe": "base.yaml"}, "there is no recipe at '.*base.yaml'"),
        ({"tables": ["methods"]}, "'tables' names 'methods', which is no axis – did you mean 'method'?"),
        ({"only": [{"methods": "a"}]}, "'only' names 'methods', no axis – did you mean 'method'?"),
        ({"without": [{"method": "LoRA"}]}, "'without' names 'LoRA', no value of 'method' – did you mean 'LoRA 4'?"),
        ({"without": [{"seed": [0, 1]}]}, "'only' and 'without' leave no combination to run"),
        ({"claims": [{"ahead": "MoDE", "of": "LoRA 4"}]}, "'claims.0.ahead' names 'MoDE', which no axis has – did you"),
        (
            {"claims": [{"ahead": "LoRA 4", "of": "LoRA 4"}]},
            "'claims.0' compares 'LoRA 4' with 'LoRA 4', which are not",
        ),
        ({"claims": [None]}, r"study.yaml:\d+: 'claims.0' must be a section.*, got None"),
        (
            {"claims": [{"ahead": "MoDE 2x2", "of": "LoRA 4", "where": {"seed": 0}}]},
            "'claims.0.where' names 'seed', but a claim is about all seeds: drop it",
        ),
        ({"claims": [{"ahead": "LoRA 4"}]}, r"study.yaml:\d+: 'claims.0': 'of' is missing"),
        ({"claims": [{"equal": "a", "to": "b"}]}, "'claims.0': 'within' is missing beside 'equal'"),
        ({"claims": [{"ahead": "a", "of": "b", "within": 1}]}, "'claims.0': 'within' does not go with 'ahead'"),
        ({"claims": [{"ahead": "a", "off": "b"}]}, r"study.yaml:\d+: unknown key 'claims.0.off' – did you mean 'of'?"),
        ({"claims": [{"ahead": "a", "of": "b", "by": 1, "clear_of": 2}]}, "clear_of 2 is above by 1"),
        ({"budget": {}}, r"study.yaml:\d+: 'budget': a budget is either `like: NAME` or `parameters: NUMBER`"),
        ({"choose": {"values": [1, 2, 3], "start": [1, 3]}}, "start must be two neighbours among the values"),
        ({"adjust": [{"where": {"size": "x"}, "recipe": {"seed": 1}}]}, "'adjust.0.where' names 'size', no axis"),
        (
            {"adjust": [{"where": {"seed": 1}, "recipe": {"train": {"stepz": 1}}}]},
            r"study.yaml:\d+: unknown key 'train.stepz'",
        ),
        ({"claim": []}, r"study.yaml:\d+: unknown key 'claim' – did you mean 'claims'?"),
        ({"name": "a/b"}, "'a/b' cannot name a folder"),
        ({"vary": None}, "'vary' is missing"),
    ],
)
def test_a_mistake_is_named_with_what_mends_it(sections: dict[str, Any], message: str, write: Write) -> None:
    path = write(**sections)
    with pytest.raises(DyadsError, match=message):
        claims_in(path)


def test_an_override_of_a_varied_key_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=re.escape("--set seed=3: the study varies that key; --only runs a part")):
        load_study(write(), ["seed=3"])
    with pytest.raises(ConfigError, match=r"there is no study at 'nowhere\.yaml'"):
        load_study("nowhere.yaml")


def test_values_with_one_name_are_told_apart_or_refused(write: Write) -> None:
    vary = {"method": {"a": LORA, "b": MODE}, "other": {"a": None}, "seed": [0]}
    study = load_study(write(vary=vary, claims=[{"ahead": "b", "of": "a"}]))
    with pytest.raises(ConfigError, match=r"'claims\.0\.of' names 'a', which is a value of 'method' and 'other'"):
        claims_of(study, study.cells())


def test_every_key_of_a_study_is_explained() -> None:
    keys = list(study_keys())
    assert {"name", "vary", "budget.like", "choose.key", "claims.ahead"} < {key.name for key in keys}
    assert all(len(key.help.split()) > 1 for key in keys)


# --- the studies of the repository ------------------------------------------------------------------------------------

STUDIES = sorted(ROOT.glob("recipes/*/study*.yaml"))
CELLS = {
    "answers-cpu": 14,
    "answers-paper": 20,
    "evidence-glue": 26,
    "evidence-ladder": 27,
    "evidence-sni": 17,
    "evidence-starter": 44,
    "evidence-tasks": 15,
    "few-tasks-cpu": 21,
    "few-tasks-paper": 52,
    "glue-ablations-mode": 34,
    "glue-ablations-more": 31,
    "glue-transfer": 138,
    "mode-equal-paper": 36,
    "mode-fifteen-cpu": 48,
    "mode-fifteen-paper": 34,
    "mode-groups-cpu": 16,
    "mode-groups-paper": 24,
    "mode-single-cpu": 16,
    "mode-single-paper": 60,
    "mode-sizes-paper": 30,
    "more-ablation-paper": 24,
    "more-commonsense-paper": 10,
    "more-fewshot-paper": 108,
    "more-glue-paper": 13,
    "more-llama-paper": 10,
    "more-sensitivity-cpu": 16,
    "more-sensitivity-paper": 24,
    "unseen-cpu": 10,
    "unseen-paper": 16,
}
ADAPTED = {
    "glue-transfer": ("evidence/study-glue.yaml", "LoRA-18-learning_rate0.001"),
    "more-fewshot-paper": ("studies/study-more-glue-paper.yaml", "LoRA-8"),
}
"""Studies that adapt the runs of another one: its file, and the name of its first run."""


def test_every_study_of_the_repository_is_known() -> None:
    assert {load_study(path).spec.name for path in STUDIES} == set(CELLS)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_cell_of_a_shipped_study_is_a_recipe(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = load_study(path)
    if study.spec.name in ADAPTED:
        source, first = ADAPTED[study.spec.name]
        trained = load_study(ROOT / "recipes" / source)
        runs = f"runs/studies/{trained.spec.name}"
        with pytest.raises(DyadsError, match=rf"adapt\.run: there is no folder '{runs}/{first}-seed0'"):
            study.cells()
        for cell in trained.cells().values():
            RunFolder.create(tmp_path / runs / cell.name, cell.recipe, resume=True)
    cells = study.cells()
    assert len({cell.name for cell in cells.values()}) == CELLS[study.spec.name]
    checked = {}
    for cell in cells.values():
        checked.setdefault(str(cell.recipe.method), cell.recipe)
    for recipe in checked.values():
        recipe.check()
    claims = claims_of(study, cells)
    assert claims
    assert all(cell.recipe.train.steps >= 60 for claim in claims for cell in claim.runs)


def test_the_adapters_of_unseen_tasks_have_no_rows_for_them_in_the_budget(tmp_path: Path) -> None:
    study = load_study(ROOT / "recipes/studies/study-unseen-cpu.yaml")
    cell = next(cell for cell in study.cells().values() if cell.label == "MoRE 9")
    sni = write_sni(tmp_path / "sni")
    tasks = cell.recipe.tasks.model_copy(update={"path": Path(sni["path"]), "names": None})
    recipe = cell.recipe.model_copy(update={"tasks": tasks})
    assert task_names(recipe) == ("task001_colours", "task002_colours")
    assert scored_names(recipe) == ("task003_colours",)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"vary": {f"train.{key}": list(range(1, 60)) for key in ("steps", "batch_size")}},
            "3,481 combinations; at most",
        ),
        ({"without": [{"seed": 0}] * 101}, "'without' has 101 entries; at most 100 are read"),
        ({"vary": {"a": {"con!": LORA, "b": MODE}}, "claims": None}, "the folder 'con', and the name is res"),
        ({"vary": {"a": {"名" * 70: LORA, "b": MODE}}, "claims": None}, "it has 210 bytes, and 180 are allowed"),
        (
            {"vary": {"a": {"Logs": LORA, "b": MODE}}, "claims": None},
            "'Logs', and a study has a file or folder of that",
        ),
        ({"vary": {"a": {"É": LORA, "é": MODE}}, "claims": None}, "two cells would have the folder 'é'"),
    ],
)
def test_grids_that_are_too_large_and_folders_that_some_systems_refuse(
    write: Write, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(**sections)).cells()
