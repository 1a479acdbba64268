# SPDX-License-Identifier: Apache-2.0
"""Tests of README and docs: numbers stand in tables, the table of methods is current, links resolve, recipes load."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

from dyads.cli import main
from dyads.cli.methods import command as methods_command
from dyads.methods import methods
from dyads.recipe.load import load_recipe, parse_recipe
from dyads.runs.folder import RunFolder
from dyads.tasks import families, metric_names
from dyads.tasks.own_rows import CHAT_COLUMNS
from dyads.training.adapt import adapt_recipe
from tiny import VARIANTS

ROOT = Path(__file__).parent.parent


def module_of(file: str) -> ModuleType:
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CHANGELOG.md", "LOG.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))]


def test_table_of_methods_is_current() -> None:
    table = CliRunner().invoke(methods_command, ["--format", "markdown"], catch_exceptions=False).output
    formula = (ROOT / "docs/formula.md").read_text(encoding="utf-8")
    shown = re.search(r"-->\n\n(\| method .*?)\n<!-- end -->", formula, re.DOTALL)
    assert shown is not None
    assert shown[1] == table, (
        "The table of methods in docs/formula.md is not current: replace it by the output of"
        " `dyads methods --format markdown`"
    )


def test_every_method_has_an_entry_among_the_papers() -> None:
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^ *name: (\w+)", papers, re.MULTILINE)) | set(re.findall(r"\w+Config\b", papers))
    without = [m.key for m in methods() if not {m.key, m.config.__name__} & named]
    assert not without, (
        f"docs/papers.md has no entry for {', '.join(without)}: add a section with the paper and its configuration as"
        " ours (a snippet with the config class, or a recipe with `name: …`)"
    )


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([\w./-]*)(?:#([\w-]+))?\)", text):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {path}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {path or page} has no #{anchor}"


@pytest.mark.parametrize("study", ["demo", "glue-minilm", "glue-ablations"])
def test_shipped_recipes_load_and_resolve_to_themselves(study: str) -> None:
    paths = [p for p in sorted((ROOT / "recipes" / study).glob("*.yaml")) if not p.name.startswith("study")]
    assert paths
    for path in paths:
        recipe = load_recipe(path)
        assert parse_recipe(recipe.resolved_yaml(), path.name) == recipe


@pytest.mark.parametrize(
    ("task", "family"), [("scitail", "scitail"), ("cb", "superglue"), ("boolq", "superglue")], ids=lambda value: value
)
def test_shipped_new_tasks_can_be_adapted_to(task: str, family: str, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", load_recipe(ROOT / "recipes/glue-ablations/more.yaml"))
    recipe = adapt_recipe(run.path, ROOT / f"recipes/glue-transfer/{task}.yaml", {"shots": 4})
    assert (recipe.tasks.family, recipe.train.steps, recipe.method.name) == (family, 60, "more")


# --- the README -----------------------------------------------------------------------------------------------------


def shell_lines(markdown: str) -> list[str]:
    """The lines of blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    return [line for language, text in blocks if not language for line in text.splitlines()]


def test_every_command_of_the_readme_has_the_options_that_it_is_shown_with() -> None:
    group, context = main, click.Context(main)
    shown = [
        *re.findall(r"`dyads ([a-z]+)([^`\n]*)`", README),
        *re.findall(r"^dyads ([a-z]+)(.*)$", "\n".join(shell_lines(README)), re.MULTILINE),
    ]
    for verb, rest in shown:
        command = group.get_command(context, verb)
        assert command is not None, f"there is no verb '{verb}'"
        known = {name for parameter in command.params for name in parameter.opts}
        for option in re.findall(r"--[a-z-]+", rest.partition("#")[0]):
            assert option in known, f"dyads {verb} has no {option}"
    assert set(group.list_commands(context)) <= {verb for verb, _ in shown}, "a verb without a line"


def test_the_commands_of_the_makefile_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_numbers_of_the_readme_are_those_of_their_tables() -> None:
    """A row of a table in docs/results.md or docs/benchmarks.md for every score and ratio in the section on LoRA."""
    results, benchmarks = ((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("results", "benchmarks"))
    _, _, section = README.partition("## Why rather than LoRA")
    section = " ".join(section.partition("\n## ")[0].split())
    for text, page, row in (
        (
            "LoRA 9 has 46.0, MoDE 4x2 has 46.3",
            results,
            r"\| LoRA 9 \|.* 46\.0 \|[^\n]*\n.*\n\| MoDE 4x2 \|.* 46\.3 \|",
        ),
        ("LoRA 18 has 59.1", results, r"\| LoRA 18 \|.* 59\.1 \|"),
        ("TaskMoDE h 4x7 has 58.9", results, r"\| TaskMoDE h 4x7 † \|.* 58\.9 \|"),
        ("MoDE 4x4 has 58.2", results, r"\| MoDE 4x4 \|.* 58\.2 \|"),
        ("TaskMoDE h 4x4 has 47.6", results, r"\| TaskMoDE h 4x4 † \|.* 47\.6 \|"),
        ("+1.6, 95 % interval 0.1 to 3.1", results, r"\| TaskMoDE h 4x4 † − LoRA 9 \|.* \+1\.6 \| 0\.1 to 3\.1 \|"),
        ("LoRA 9 has 95.9", results, r"\| LoRA 9 \|.* 95\.9 \|"),
        ("MTL-LoRA 4x4 has 96.9", results, r"\| MTL-LoRA 4x4 † \|.* 96\.9 \|"),
        ("MoDE 4x2 has 95.1", results, r"\| MoDE 4x2 \|.* 95\.1 \|"),
        ("MoDE 16x4 takes 0.87 times", benchmarks, r"\| MoDE 16x4 \| [\d,]+ \| 0\.87 "),
        ("decodes 0.91 of the tokens", benchmarks, r"decoding: MoDE 16x4 ÷ PEFT LoRA, tokens/s \| ≥ 0\.9 \| 0\.91 "),
    ):
        assert text in section, f"the README no longer says {text!r}: change this test with it"
        assert re.search(row, page), f"no table says {text!r}"


def test_numbers_of_the_choices_and_of_time_and_memory_are_those_of_their_tables() -> None:
    results, costs = ((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("results", "step-cost"))
    assert "an embedding in each layer, 288 parameters in" in README
    assert re.search(r"^\| parameters that train, .*\| 288 \|$", results, re.MULTILINE)
    rows = re.findall(r"^\| (?:SmolLM2|shape of).*", README, re.MULTILINE)
    assert len(rows) == 3
    assert not set(rows) - set(costs.splitlines())
    assert set(
        re.findall(r"says ([\d.]+ GB), and ([\d.]+ GB)", (ROOT / "docs/questions.md").read_text("utf-8"))[0]
    ) <= {cell.partition(",")[0].strip() for row in rows for cell in row.split("|")}


def table_numbers(page: str) -> set[str]:
    """The numbers in the tables of a page, without sign."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return set(re.findall(NUMBER, "\n".join(line for line in lines if line.startswith("|"))))


NUMBER = r"\d{1,3}(?:,\d{3})+|\d+\.\d+"
TABLES = ("docs/results.md", "docs/benchmarks.md", "docs/step-cost.md")
NO_RESULTS = {"3.10", "1.5", "2.0"}
"""Of Python, of a model's name and of the licence."""


@pytest.mark.parametrize("page", ["README.md", "docs/choose.md", "docs/questions.md"])
def test_every_number_stands_in_a_table_of_results(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    known = NO_RESULTS.union(*map(table_numbers, TABLES))
    assert not set(re.findall(NUMBER, text)) - known


def prose(page: str) -> str:
    """The sentences of a page in one line: without blocks, tables and what `dyads compare` prints below its tables."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(
        r"^(\|.*|- .*training loss still fell.*|\\\* p < .*|- intervals: .*|- train\..* differs: .*)$",
        "",
        text,
        flags=re.M,
    )
    return " ".join(text.split()).replace("−", "-")


def cells(page: str) -> list[list[str]]:
    """The rows of all tables of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[c.strip().replace("−", "-") for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]


OF_PAPERS = {"87.3", "85.1", "148,296", "83.8", "0.3", "1.2", "1.1", "0.9"}
CONSTANTS = {
    "export": {"0.1", "0.3", "1.0"},
    "serving": {"0.0", "2,000", "2.8", "8,192", "65,536"},
    "step-cost": {"0.6", "2.13"},
}
"""Numbers in sentences of a page that are no results: of versions, limits and formulas, and what options come to."""


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return module_of("docs/tables.py")


@pytest.mark.parametrize("page", ["export", "reliability", "results", "serving", "step-cost", "transfer"])
def test_tables_and_sentences_of_a_page_are_those_of_its_file_of_results(page: str, tables: ModuleType) -> None:
    """Every table, every line that a command printed, and every number in a sentence."""
    assert page in tables.PAGES
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    found = tables.results(page)
    assert tables.built(text, found.get("tables", [])) == text, (
        f"new numbers go into docs/{page}.json; then: python docs/tables.py"
    )
    assert tables.to_json(found) == (ROOT / f"docs/{page}.json").read_text(encoding="utf-8")
    lines = found.get("lines", [])
    assert not set(lines) - set(text.splitlines())
    if page == "results":  # all but the list of studies
        assert len(found["tables"]) == len(tables.read(text)) - 1
        notes = re.findall(r"^(?:- .*training loss still fell.*|- .* differs: .*|\d+ runs of .*)$", text, re.MULTILINE)
        assert not set(notes) - set(lines)
    facts = found.get("facts", {})
    if page != "results":  # next test
        known = {n for table in found.get("tables", []) for n in re.findall(NUMBER, str(table["rows"]))}
        said = set(re.findall(NUMBER, prose(f"docs/{page}.md")))
        assert said - known - facts.keys() == CONSTANTS.get(page, set()), f"put measured numbers into docs/{page}.json"
        assert not facts.keys() - said, "a fact that no sentence has"


def test_every_number_in_the_sentences_of_the_results_stands_in_their_tables() -> None:
    """As it is or rounded; or it is a sum or a product of numbers of the set-up."""
    known = table_numbers("docs/results.md")
    rounded = {f"{float(n.replace(',', '')):.2f}" for n in known}
    rows = cells("docs/results.md")
    glue = {
        row[0]: int(row[3])
        for row in rows
        if len(row) == 10 and row[0] in ("cola", "mnli", "mrpc", "qqp", "rte", "sst2", "stsb", "wnli")
    }
    counted = {f"{n:,}" for n in (sum(glue.values()), 200 * 16, 400 * 16, 800 * 16, 1500 * 16, 12 * 100, 45 * 25)}
    said = set(re.findall(NUMBER, prose("docs/results.md")))
    facts = json.loads((ROOT / "docs/results.json").read_text(encoding="utf-8"))["facts"]
    assert said - known - rounded - counted - OF_PAPERS == facts.keys()
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    assert not [n for n in OF_PAPERS & said if n not in papers and n.replace(",", "") not in papers]


def test_every_difference_with_its_interval_in_the_results_stands_in_one_row_of_a_table() -> None:
    """Or with the other sign, where a sentence says by how much a method is behind."""
    number = r"[+-]?\d+\.\d"
    known = set()
    for row in cells("docs/results.md"):
        for difference, interval in itertools.pairwise(row):
            if re.fullmatch(number, difference) and re.fullmatch(f"{number} to {number}", interval):
                known.add((float(difference), *map(float, interval.split(" to "))))
    said = re.findall(rf"({number})(?:,| \() ?({number}) to ({number})", prose("docs/results.md"))
    assert len(said) > 20
    for a, low, high in (tuple(map(float, found)) for found in said):
        assert {(a, low, high), (-a, -high, -low)} & known, (a, low, high)


def test_the_page_of_benchmarks_agrees_with_itself() -> None:
    """Verdicts with bars and measurements; bars with the rows of the tables; sentences with bars."""
    rows = cells("docs/benchmarks.md")
    bars = {row[0]: row[1:] for row in rows if len(row) == 4 and row[1][:1] in "≤≥"}
    assert len(bars) == 19
    for what, (bound, measured, verdict) in bars.items():
        sign, limit = bound.split()
        value = float(measured.partition(" ")[0])
        assert verdict == ("met" if (value <= float(limit) if sign == "≤" else value >= float(limit)) else "not met"), (
            what
        )
    table = {row[0]: row[1:] for row in rows if len(row) == 7}
    for bar, contender, column in (
        ("step: MoDE 16x4 ÷ PEFT LoRA, fp32 adapters", "MoDE 16x4", 1),
        ("step: MoLORA 8x8 ÷ PEFT LoRA r=64", "MoLORA 8x8", 1),
        ("kept for backward: MoDE 16x4 ÷ PEFT LoRA", "MoDE 16x4", 4),
        ("decoding: MoDE 16x4 ÷ PEFT LoRA, tokens/s", "MoDE 16x4", 3),
    ):
        assert bars[bar][1] == table[contender][column], bar
    text = prose("docs/benchmarks.md")
    scoring = bars["scoring: dyads ÷ a loop of generate, examples/s"][1]
    assert f"ratio {scoring}, in a process as users have it" in text
    ours, theirs = re.findall(r"in file order: ([\d.]+) \([^)]*\) and ([\d.]+) ", text)[0]
    assert float(ours) / float(theirs) == pytest.approx(float(scoring.partition(" ")[0]), abs=0.02)
    assert f"Predictions that differ: {bars['scoring in fp32: answers that differ'][1]} of" in text
    (run,) = (row for row in rows if row[0] == "dyads, MoDE 16x4")
    assert run[-1] == bars["training run: dyads ÷ TRL, examples/s"][1]


def test_the_numbers_of_the_page_on_reliability_add_up() -> None:
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    tried = {
        row[0]: (int(row[1].replace(",", "")), row[2], row[3])
        for row in cells("docs/reliability.md")
        if len(row) == 4 and row[1][:1].isdigit()
    }
    calls, times, full, denied, replaced, hostile = tried.values()
    assert f"--count {calls[0] + times[0]}`" in calls[2]
    assert f"Of the {calls[0] + times[0]:,} kills none" in page
    assert f"--spread {full[0]}`" in full[2]
    assert denied[0] == full[0]
    assert f"KILLS ?= {calls[0] + times[0]}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    accepted, refused = re.findall(r"Of the hostile files ([\d,]+) were accepted and ([\d,]+) refused", page)[0]
    assert int(accepted.replace(",", "")) + int(refused.replace(",", "")) + int(hostile[1]) == hostile[0]
    each = re.findall(r"\| an evaluation that replaces .* of its (\d+) calls \|", page)
    assert replaced[0] == int(each[0]) * replaced[2].count("--fault")
    assert [row[1] for row in (calls, times, full, denied, replaced, hostile)] == ["0"] * 6


def test_the_adapters_of_the_picture_have_about_as_many_parameters_as_the_readme_says() -> None:
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8").partition("## Fifteen Super-Natural")[2]
    counts = re.findall(r"^\| (?:LoRA|Mo|Task)[^|]+\|(?:[^|]+\|){5} ([\d,]+) \| 3 \| 400 \|", results, re.MULTILINE)
    assert len(counts) == 5
    assert all(0.95e6 < int(count.replace(",", "")) < 1.1e6 for count in counts)


@pytest.mark.parametrize("row", re.findall(r"^\| `.*", (ROOT / "docs/choose.md").read_text(), re.MULTILINE))
def test_differences_on_the_page_of_choices_are_those_of_the_studies(row: str) -> None:
    """All columns of a row; the number and its interval stand in one row of the results, for a run of that method."""
    labels = {
        "mode": "MoDE", "moelora": "MOELoRA", "more": "MoRE", "mtl_lora": "MTL-LoRA", "task_mode": "TaskMoDE"
    }  # fmt: skip
    name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for cell, base in zip(cells, ("LoRA 9", "LoRA 18", "LoRA 9"), strict=True):
        if found := re.fullmatch(r"([+-][\d.]+) \((.* to .*)\)", cell):
            label = labels.get(name.strip("`"), "MoLORA-SD" if "shared_down" in name else "MoLORA")
            row_of = rf"^\| {label} [^|]*− {base} \|.*\| {re.escape(found[1])} \| {re.escape(found[2])} \|"
            assert re.search(row_of, results, re.MULTILINE), f"{name}: {cell}"


def test_what_the_gates_of_each_method_look_at_is_on_the_page_of_choices() -> None:
    page = (ROOT / "docs/choose.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (the task|the token|both) \| ([^|]*)\|", page, re.MULTILINE)
    shown = {name: what for what, names in rows for name in re.findall(r"`(\w+)`", names)}
    found: dict[str, set[str]] = {}
    for variant in VARIANTS:
        found.setdefault(variant.key, set()).update(variant.config().core(8).looks_at)
    words = {(True, False): "the task", (False, True): "the token", (True, True): "both"}
    assert shown == {name: words["task" in looks, bool(looks & {"x", "h"})] for name, looks in found.items()}


def test_the_names_of_methods_have_an_x_everywhere() -> None:
    """As in recipes, tables and run folders: MoDE 4x2. A × between numbers is for shapes, such as batch 8×128."""
    places = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("recipes/*/*"),
    ]
    texts = {path: path.read_text(encoding="utf-8") for path in places if path.is_file()}
    found = {str(path): re.findall(r"(?<!batch )\b\d+×\d+", text) for path, text in texts.items()}
    assert not {path: names for path, names in found.items() if names}


# --- docs/tasks.md ----------------------------------------------------------------------------------------------------

TASKS = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")


def test_every_family_metric_and_column_of_own_rows_is_on_the_page_of_tasks() -> None:
    for name in (*families(), *metric_names(), *CHAT_COLUMNS):
        assert f"`{name}`" in TASKS, f"docs/tasks.md does not mention {name}"
