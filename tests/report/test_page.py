# SPDX-License-Identifier: Apache-2.0
"""The page as a file: its content, its size, and that texts from runs stay texts."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dyads.cli import main
from dyads.comparing.comparison import compare
from dyads.errors import RunError
from dyads.report.content import answer_to, content_of, curves_of
from dyads.report.instances import instances_of, kept, pack
from dyads.report.learned import learned_by, plane
from dyads.report.page import SECTIONS, page_of
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter


class Reader(HTMLParser):
    """Texts, tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def data_of(page: str) -> Any:
    packed = re.search(r'<script type="text/plain" id="data">([^<]*)</script>', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


def test_the_page_answers_in_order_and_needs_nothing_from_outside(fifteen: Callable[..., list[Path]]) -> None:
    page = page_of(compare(fifteen()), model=False)
    reader = Reader(page)
    assert [s["id"] for s in reader.all("section")] == [name for name, _ in SECTIONS]
    assert not reader.all("link")
    assert not [s for s in reader.all("script") if "src" in s]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in reader.all("a"):
        target = str(link["href"])
        assert target.startswith("#")
        assert target[1:].split("?")[0] in ids


def test_the_policy_names_the_pages_own_script(fifteen: Callable[..., list[Path]]) -> None:
    page = page_of(compare(fifteen()), model=False)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_numbers_are_those_of_the_comparison(fifteen: Callable[..., list[Path]]) -> None:
    comparison = compare(fifteen(tasks=4, methods=3, seeds=2), baseline="method 1")
    text = " ".join(" ".join(Reader(page_of(comparison, model=False)).texts).split())
    for column in comparison.columns:
        assert f"{column.macro.value:.1f}" in text
        assert f"{column.micro.low:.1f} to {column.micro.high:.1f}" in text
    for task in comparison.tasks:
        assert task.task in text
    for note in comparison.notes:
        assert note in text
    pair = comparison.pair("method 2", "method 1")
    assert f"{pair.macro.value:+.1f} ({pair.macro.low:.1f} to {pair.macro.high:.1f})" in text
    assert f"{100 * pair.win_rate:.0f}" in text
    assert "minus method 1" in text


def test_every_answer_is_on_the_page_and_every_aggregate_points_to_its_instances(
    fifteen: Callable[..., list[Path]],
) -> None:
    paths = fifteen(tasks=3, methods=3, seeds=2)
    comparison = compare(paths)
    page = page_of(comparison, model=False)
    data = data_of(page)
    assert [task["name"] for task in data["tasks"]] == [task.task for task in comparison.tasks]
    assert data["seeds"] == ["0", "1"]
    for run, answers in zip(data["runs"], data["answers"], strict=True):
        column = comparison.columns[run["method"]]
        folder = RunFolder(column.runs[column.seeds.index(int(run["seed"]))])
        for task, own in zip(data["tasks"], answers, strict=True):
            rows = {p["id"]: p for p in folder.predictions(task["name"])}
            assert own["texts"] == [rows[i["id"]]["prediction"] for i in task["instances"]]
            assert own["scores"] == [rows[i["id"]]["scores"]["rouge_l"] for i in task["instances"]]
            assert [i["prompt"] for i in task["instances"]] == [rows[i["id"]]["prompt"] for i in task["instances"]]
    links = {str(a["href"]) for a in Reader(page).all("a")}
    for m in range(3):
        assert f"#instances?method={m}" in links
        for t in range(3):
            assert f"#instances?task={t}&method={m}" in links
        assert {f"#instances?method={m}&against={o}" for o in range(3) if o != m} <= links


def test_fifteen_tasks_and_six_methods_stay_below_three_megabytes(fifteen: Callable[..., list[Path]]) -> None:
    page = page_of(compare(fifteen(tasks=15, methods=6, n=100, prompt=500)), model=False)
    assert len(page.encode()) < 3_000_000
    assert len(data_of(page)["tasks"][0]["instances"]) == 100


def test_too_many_instances_are_left_out_and_the_page_says_so(
    fifteen: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare(fifteen(n=40))
    data = instances_of(comparison)
    packed, left = kept(data, most=len(pack(data)) // 2)
    assert left in (5, 10, 20)
    short = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert short["tasks"][0]["instances"] == data["tasks"][0]["instances"][:left]
    assert short["answers"][0][0]["scores"] == data["answers"][0][0]["scores"][:left]
    assert len(packed) <= len(pack(data)) // 2
    assert kept(data) == (pack(data), None)
    monkeypatch.setattr("dyads.report.page.kept", lambda data: (packed, left))
    assert f"The page has the first {left} of at most 40 instances" in page_of(comparison, model=False)


def test_a_page_without_instances_has_no_text_of_the_data(learned: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["report", str(learned[0]), "--out", str(out), "--no-instances"])
    assert result.exit_code == 0, result.output
    page = out.read_text(encoding="utf-8")
    data = data_of(page)
    assert [task["instances"] for task in data["tasks"]] == [[]] * len(data["tasks"])
    assert all(of_task == {"texts": [], "scores": []} for of_run in data["answers"] for of_task in of_run)
    assert data["learned"]
    assert not any(entry["tokens"] for entry in data["learned"])
    assert "written without instances" in page
    assert '<form id="filters" class="filters" hidden>' in page
    for prediction in RunFolder(learned[0]).predictions(data["tasks"][0]["name"]):
        assert prediction["prompt"] not in page + json.dumps(data)


def test_texts_from_runs_stay_texts(hostile: list[Path]) -> None:
    page = page_of(compare(hostile), model=False)
    reader = Reader(page)
    assert len(reader.all("script")) == 2
    assert not reader.all("img")
    assert not reader.all("b")
    assert "it's b" in " ".join(reader.texts)
    assert "&amp;" in page
    assert "\u202e" not in page
    data = data_of(page)
    assert data["tasks"][0]["instances"][0]["prompt"].startswith("</script><img")
    assert "\u202e" not in json.dumps(data, ensure_ascii=False)


def test_the_first_sentence_says_what_is_beyond_chance(run: Callable[..., Path]) -> None:
    low = [run("low", {"a": [10.0, 12, 11, 9, 10, 12], "b": [20.0, 21, 19, 20, 22, 20]}, seed=s) for s in range(3)]
    high = [run("high", {"a": [50.0, 52, 51, 49, 50, 52], "b": [60.0, 61, 59, 60, 62, 60]}, seed=s) for s in range(3)]
    same = [run("same", {"a": [50.0, 50, 51, 49, 50, 52], "b": [60.0, 61, 59, 60, 62, 58]}, seed=s) for s in range(3)]
    assert "high is ahead of low by 40.0 (" in answer_to(compare([*low, *high]))
    assert answer_to(compare([*high, *same])).startswith("No difference between trained methods is beyond chance: ")
    assert answer_to(compare([*high, *same], baseline="same")).startswith("No difference from same is beyond chance: ")
    none = run("none", {"a": [0.0, 2, 0, 0, 0, 0], "b": [0.0, 0, 1, 0, 0, 0]}, method="majority")
    reference = answer_to(compare([*low, *high, none], baseline="none"))
    assert reference == (
        "high has the highest mean over tasks, 55.5. Trained methods are compared with none here, not with each other."
    )
    assert answer_to(compare(high)).startswith("high scores 55.5 as a mean over tasks")
    alone = answer_to(compare([low[0], high[0]]))
    assert alone.endswith("For these trained adapters alone: there is one seed.")


def test_positions_lie_on_the_common_scale(run: Callable[..., Path]) -> None:
    paths = [run("a", {"t": [0.0, 100, 50, 50]}), run("b", {"t": [100.0, 100, 100, 100]})]
    content = content_of(compare(paths))
    a, b = content["tasks"][0]["rows"]
    ticks = {tick["text"]: tick["x"] for tick in content["ticks"]}
    assert b["x"] == ticks["100"] == 100
    assert 0 <= a["x_low"] < a["x"] < a["x_high"] <= 100
    assert a["x"] == pytest.approx((ticks["0"] + ticks["100"]) / 2, abs=0.1)


def test_curves_take_the_later_line_of_a_repeated_step(tmp_path: Path, run: Callable[..., Path]) -> None:
    folder = RunFolder(run("a", {"t": [1.0, 2.0]}, losses=[(10, 3.0), (20, 2.0), (10, 2.5)]))
    folder.append_log({"step": 30, "loss": float("nan"), "learning_rate": 1e-3})
    folder.append_log({"event": "validated", "step": 30, "validation_loss": 2.0, "tasks": {"t": 2.0}})
    curves = {curve["name"]: curve["series"] for curve in curves_of(compare([folder]))}
    assert curves["training loss"][0]["points"] == [(10, 2.5), (20, 2.0), (30, None)]
    assert curves["learning rate"][0]["points"] == [(30, 0.001)]
    assert curves["validation loss: t"][0]["points"] == [(30, 2.0)]


def test_equal_tasks_stand_at_one_place_and_opposite_ones_apart() -> None:
    x, y = plane(np.array([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]]))
    assert x[0] == pytest.approx(x[1], abs=1e-3)
    assert abs(x[0] - x[2]) == 1
    assert all(0 <= v <= 1 for v in (*x, *y))


def test_trained_adapters_have_heat_maps_task_maps_and_tokens(learned: list[Path]) -> None:
    page = page_of(compare(learned))
    data = data_of(page)
    found = {entry["name"].rstrip(" †"): entry for entry in data["learned"]}
    assert set(found) == {"mode", "more", "lora"}
    titles = {name: [m["title"] for m in entry["maps"]] for name, entry in found.items()}
    assert "Ranks that tasks chose" in titles["more"]
    assert "Entropy of a token's gates" in titles["mode"]
    assert titles["lora"] == ["Effective rank of the update"]
    for entry in found.values():
        for heat in entry["maps"]:
            assert len(heat["values"]) == len(heat["rows"])
            assert {len(row) for row in heat["values"]} == {len(heat["columns"])}
    tokens = found["mode"]["tokens"]
    instance = tokens["instances"][0]
    assert len(instance["expert"]) == len(tokens["layers"]) == 7  # six layers, and their mean
    assert {len(row) for row in instance["expert"]} == {len(instance["texts"])}
    assert found["more"]["tokens"] is None
    without = data_of(page_of(compare(learned), model=False))
    assert "--no-model" in page_of(compare(learned), model=False)
    assert next(e for e in without["learned"] if e["name"] == "mode")["tokens"] is None


def test_many_tasks_are_not_compared_pair_by_pair(learned: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyads.report.learned._MOST_PAIRED", 1)
    page = page_of(compare(learned), model=False)
    entries = data_of(page)["learned"]
    titles = {m["title"] for entry in entries for m in entry["maps"]}
    assert "Experts by task" in titles
    assert not [title for title in titles if "Similarity" in title or "Overlap of tasks" in title]
    assert not any(entry["taskmaps"] for entry in entries)
    assert "tasks are too many for a map of their pairs" in page


def test_a_note_of_several_methods_stands_once(learned: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(folder: Path) -> SavedAdapter:
        raise RunError("locked" if folder == learned[1] else "damaged")

    monkeypatch.setattr(SavedAdapter, "read", unreadable)
    assert learned_by(compare(learned), model=False)[1] == ["mode, lora: damaged", "more †: locked"]


def test_an_adapter_that_cannot_be_read_is_a_note(learned: list[Path]) -> None:
    (learned[0] / "adapter" / "adapter_model.safetensors").write_bytes(b"half")
    page = page_of(compare(learned))
    assert "is damaged" in page
    assert len(data_of(page)["learned"]) == 2


def test_the_same_runs_give_the_same_page(fifteen: Callable[..., list[Path]]) -> None:
    paths = fifteen()
    assert page_of(compare(paths), model=False) == page_of(compare(paths), model=False)


def test_the_command_writes_the_page_and_opens_it(
    fifteen: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    fifteen()
    out = tmp_path / "page.html"
    result = CliRunner().invoke(main, ["report", str(tmp_path / "runs"), "--out", str(out), "--open", "--no-model"])
    assert result.exit_code == 0, result.output
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert opened == [out.as_uri()]
    assert "written to" in result.output
    result = CliRunner().invoke(main, ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "none" / "a.html")])
    assert "there is no folder" in result.output
    result = CliRunner().invoke(main, ["report", str(tmp_path / "runs"), "--figure-format", "png"])
    assert "--figure-format is for --figures FOLDER" in result.output


def test_figures_are_written_in_every_format(
    learned: list[Path], fifteen: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs `pip install matplotlib`")
    from dyads.report.figures import write_figures

    # Few: each takes long.
    written = write_figures(compare(learned[1:2]), tmp_path / "figures", ("svg",))
    written += write_figures(compare(fifteen()), tmp_path / "others", ("png", "pdf"))
    assert len(written) > 10
    names = {path.stem for path in written}
    assert {"scores", "scores-by-task", "win-rates", "curve-training-loss", "more-ranks-that-tasks-chose"} <= names
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    for path in written:
        assert path.read_bytes().startswith(heads[path.suffix]), path
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["report", *map(str, learned[1:]), "--figures", str(tmp_path / "f")])
    assert "figures need Matplotlib" in result.output


def test_no_figure_replaces_another_whose_name_differs_in_signs_alone(run: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs `pip install matplotlib`")
    from dyads.report.figures import write_figures

    folder = RunFolder(run("a", {"a_b": [1.0, 2.0], "a-b": [3.0, 4.0], "чувства": [5.0, 6.0]}))
    losses = {"a_b": 2.0, "a-b": 1.0, "чувства": 3.0}
    for step in (1, 2):
        folder.append_log({"event": "validated", "step": step, "validation_loss": 2.0, "tasks": losses})
    written = write_figures(compare([folder]), tmp_path / "figures", ("svg",))
    assert len(set(written)) == len(written) == len(list((tmp_path / "figures").iterdir()))
    names = {path.stem for path in written}
    assert {"curve-validation-loss", "curve-validation-loss-a-b", "curve-validation-loss-a-b-2"} <= names
    assert "curve-validation-loss-чувства" in names


def test_references_alone_have_a_page_and_differ_in_their_marks(run: Callable[..., Path]) -> None:
    values = {"a": [0.0, 100.0], "b": [50.0, 0.0]}
    paths = [run(name, values, method=name) for name in ("majority", "zero-shot")]
    alone = Reader(page_of(compare(paths[:1]), model=False))
    assert not [table for table in alone.all("table") if table.get("class") == "wins"]
    both = Reader(page_of(compare(paths), model=False))
    classes = {circle["class"] for circle in both.all("circle")}
    assert classes == {"dot c0", "dot c0 hollow"}


def test_the_commands_are_those_that_made_the_runs(run: Callable[..., Path]) -> None:
    lora = run("lora", {"t": [1, 0]}, seed=1)
    adapted = [
        run("few", {"t": [1, 1]}, seed=seed, method="lora", adapt={"run": f"runs/lora-seed{seed}"}) for seed in (0, 1)
    ]
    how = {"unseen": "mean", "limit": 2, "split": "test"}
    beside = run("more mean", {"t": [0, 1]}, method="more", evaluate=how)
    RunFolder(beside).write_environment(adapter="runs/more", seed=0)
    comparison = compare([lora, *adapted, beside])
    lines = content_of(comparison)["commands"].splitlines()
    assert lines[1:5] == [
        f"dyads train lora.yaml --out {lora} --set seed=1",
        f"dyads train few.yaml --out {adapted[0]} --set seed=0 --set adapt.run=runs/lora-seed0",
        f"dyads train few.yaml --out {adapted[1]} --set seed=1 --set adapt.run=runs/lora-seed1",
        f"dyads evaluate runs/more --tasks 'more mean.yaml' --split test --limit 2 --unseen mean --out '{beside}'",
    ]
