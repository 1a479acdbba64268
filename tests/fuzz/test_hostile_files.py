# SPDX-License-Identifier: Apache-2.0
"""Hostile and damaged files: each is read, or refused with an error of ours, within two seconds.

`pytest tests/fuzz --hypothesis-profile full` tries more than 10,000. What once failed stands as an example.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save_file

from dyads.analysis.inspection import inspect
from dyads.cli import generate as generate_verb
from dyads.comparing.comparison import compare
from dyads.comparing.tables import FORMATS
from dyads.data.chat import ChatTemplate
from dyads.export import export
from dyads.models.heads import read_heads
from dyads.models.load import kind_of, load_tokenizer, model_config
from dyads.recipe.load import load_recipe
from dyads.runs.accept import accept
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.studies.choice import validation_loss
from dyads.studies.grid import Cell, load_study
from dyads.studies.outcome import _curve
from dyads.studies.progress import StudyFolder, state_of
from dyads.tasks import load_suite
from dyads.tasks.chat import ChatSpec
from dyads.tasks.files import FilesSpec
from dyads.tasks.task import Task
from dyads.tasks.template import Template
from dyads.training.trainer import seconds_until
from hostile import DIGITS, VALUES, accepted_or_refused, as_json, changed, damaged, shown
from made_runs import write_run
from made_studies import content_of
from tiny import MLP, Variant

RECIPE: dict[str, Any] = {
    "name": "a",
    "seed": 1,
    "model": {"name": "tiny", "dtype": "float32"},
    "method": {"name": "mode", "r": 4, "num_experts": 3, "target_modules": ["q_proj"]},
    "tasks": {"family": "files", "path": ["a.jsonl"], "labels": {"t": ["no", "yes"]}},
    "mixture": {"kind": "uniform"},
    "train": {"steps": 5, "learning_rate": 0.001, "trainer": {"adam_beta1": 0.9}, "report_to": []},
    "evaluate": {"limit": 3},
}
ROWS = [
    {"task": "t", "input": "a", "output": "b", "split": "train", "id": "1", "metric": "exact_match"},
    {"task": "t", "input": "c", "output": ["d", "e"], "split": "test", "instruction": "Say it."},
    {"task": "ü", "input": "f", "output": "g"},
    {
        "task": "t",
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "split": "train",
    },
    {"task": "ü", "input": "h", "output": "i"},
    {"task": "ü", "input": "j", "output": "k"},
]
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}, *a{i}]}}\n" for i in range(30))


@pytest.fixture(scope="module")
def place() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = changed(RECIPE).map(lambda d: yaml.safe_dump(d, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(RECIPES | RECIPES.flatmap(damaged))
@example(b"name: !!int abc\n")
@example(b"name: !!bool abc\n")
@example(b"seed: " + DIGITS.encode())
@example(b"seed: !!int " + DIGITS.encode())
@example(b"name: a\0b\n")
@example(b'name: "a\\0b"\n')
@example(b'model: {name: "\\ud800"}\n')
@example(BOMB.encode())
@example(MERGES.encode())
@example(b"a: " + b"[" * 50_000)
@example(b"a:\n" + b"".join(b" " * i + b"a:\n" for i in range(500)))
@example(b"extends: /dev/zero\n")
@example(b"extends: recipe.yaml\n")
@example(b'extends: "a\\0"\n')
@example(b"extends: " + b"a" * 5000)
@example(b"name: " + b"a" * 120_000)
@example(b"\xff\xfe")
@example(b'"' + b"a b " * 500 + b'": 1\n')
@example(b'method: "' + b"a b " * 500 + b'"\n')
@example(b"tasks: {family: '" + b"a b " * 500 + b"'}\n")
@example(b"train: {optimizer: '" + b"a b " * 500 + b"'}\n")
@example(b"name: *" + b"a" * 5000)
@example(b"a: &" + b"a" * 5000 + b" &b 1")
@example(b"? {a: b}\n: c\n")
@example(b"1: 2\n")
@example(b"tasks: {family: files, path: [" + b"a, " * 5000 + b"]}\n")
@example(b"&a [*a]\n")
@example(b"tasks: {family: []}\n")
@example(b"%YAML 9.9\n---\nname: a\n")
def test_recipes(place: Path, content: bytes) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(content)
    accepted_or_refused(lambda: load_recipe(path, check=False), content)


@given(
    st.lists(st.sampled_from(["train.steps", "name", "tasks", "method.r", "", "a.b.c", "x" * 300]), max_size=3),
    st.data(),
)
@example(["name"], None)
def test_overrides(place: Path, keys: list[str], data: Any) -> None:
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    texts = [b"1"] * len(keys) if data is None else [data.draw(damaged(b"[1, {a: b}]")) for _ in keys]
    sets = [f"{key}={text.decode('utf-8', 'replace')}" for key, text in zip(keys, texts, strict=True)]
    accepted_or_refused(lambda: load_recipe(path, sets, check=False))


@given(st.sampled_from([("method", "name"), ("method", "r"), ("train", "trainer")]), st.sampled_from(VALUES))
def test_recipes_with_their_options_checked(place: Path, key: tuple[str, str], value: Any) -> None:
    recipe = json.loads(json.dumps(RECIPE))
    recipe[key[0]][key[1]] = value
    (place / "recipe.yaml").write_bytes(yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "surrogatepass"))
    accepted_or_refused(lambda: load_recipe(place / "recipe.yaml"))


def test_a_chain_of_recipes_is_cut_off(place: Path) -> None:
    for i in range(2000):
        (place / f"chain{i}.yaml").write_text(f"extends: chain{i + 1}.yaml\n")
    accepted_or_refused(lambda: load_recipe(place / "chain0.yaml"))


# --- task files -------------------------------------------------------------------------------------------------------

LINES = st.lists(st.sampled_from(ROWS).flatmap(changed), max_size=6).map(lambda rows: b"\n".join(map(as_json, rows)))
CSV = b'task,input,output,split\nt,a,b,train\nt,"c, d","[""e"", ""f""]",test\n\xc3\xbc,g,h,\n'


@given(LINES | LINES.flatmap(damaged))
@example(b'{"task": "t", "input": "a", "output": ' + b"[" * 100_000)
@example(b'{"task": "t", "input": "a", "output": "b", "id": ' + DIGITS.encode() + b"}")
@example(b'{"task": "t", "input": "\\ud800", "output": "b"}\n' * 12)
@example(b'{"task": "t", "input": "a", "output": "b", "x": NaN}\n')
@example(b"\xff")
@example(b'{"' + b"a b " * 500 + b'": 1}\n')
@example(b'{"task": "' + b"a b " * 500 + b'", "input": "a", "output": "b"}\n')
@example(b'{"task": "t", "input": "a", "output": "b", "split": "' + b"a b " * 500 + b'"}\n')
@example(b'{"task": "t", "input": "a", "output": "b", "metric": "' + b"a b " * 500 + b'"}\n')
@example(b'{"task": "t", "messages": [{"role": "user", "content": "a"}], ' + b'"x": 1}\n')
@example(b"{" + b", ".join(b'"k%d": 1' % i for i in range(500)) + b"}\n")
def test_jsonl_files_of_tasks(place: Path, content: bytes) -> None:
    (place / "tasks.jsonl").write_bytes(content)
    accepted_or_refused(lambda: load_suite(FilesSpec(path=(place / "tasks.jsonl",))), content)


@given(LINES | LINES.flatmap(damaged))
def test_jsonl_files_of_chats(place: Path, content: bytes) -> None:
    (place / "tasks.jsonl").write_bytes(content)
    accepted_or_refused(lambda: load_suite(ChatSpec(path=(place / "tasks.jsonl",))), content)


@given(damaged(CSV))
@example(b'task,input,output\nt,x,"[""a"", ' + DIGITS.encode() + b']"\n')
@example(b'task,input,output\nt,x,"[""a"", ' + b"[" * 5000 + b'"\n')
@example(b"task,input,output\nt,x," + b"a" * 200_000 + b"\n")
@example(b"task,input,output\nt,\0,b\n")
def test_csv_files_of_tasks(place: Path, content: bytes) -> None:
    (place / "tasks.csv").write_bytes(content)
    accepted_or_refused(lambda: load_suite(FilesSpec(path=(place / "tasks.csv",))), content)


# --- studies and models -----------------------------------------------------------------------------------------------

STUDIES = changed({**content_of("tiny"), "budget": {"like": "LoRA 4"}, "only": ["LoRA*"]}).map(
    lambda d: yaml.safe_dump(d, allow_unicode=True).encode("utf-8", "surrogatepass")
)


@given(STUDIES | STUDIES.flatmap(damaged))
@example(yaml.safe_dump(content_of("tiny") | {"vary": {f"a{i}": list(range(9)) for i in range(30)}}).encode())
def test_studies(place: Path, content: bytes) -> None:
    path = place / "study.yaml"
    path.write_bytes(content)
    accepted_or_refused(lambda: load_study(path).cells(), content)


@given(st.data())
def test_configs_of_models(place: Path, llama: Path, data: Any) -> None:
    folder = place / "model"
    folder.mkdir(exist_ok=True)
    content = as_json(data.draw(changed(json.loads((llama / "config.json").read_text()))))
    (folder / "config.json").write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    accepted_or_refused(lambda: kind_of(str(folder), model_config(str(folder))), content)


@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), st.data())
def test_tokenizers(place: Path, llama: Path, name: str, data: Any) -> None:
    folder = place / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(llama / part, folder)
    content = as_json(data.draw(changed(json.loads((llama / name).read_text()))))
    (folder / name).write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    accepted_or_refused(lambda: load_tokenizer(str(folder)), content)


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] + ': ' + m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@given(damaged(TEMPLATE.encode()))
@example(b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
@example(b"{{ messages.__class__.__mro__ }}")
@example(b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
@example(b"{{ raise_exception('\x1b[31m' ~ 'a b ' * 999) }}")
def test_chat_templates(llama: Path, content: bytes) -> None:
    tokenizer = load_tokenizer(str(llama))
    accepted_or_refused(lambda: ChatTemplate(tokenizer, content.decode("utf-8", "replace")), content)


HEADS = [{"task": "a", "labels": ["no", "yes"], "mean": 0.0, "deviation": 1.0}, {"task": "b", "labels": []}]


@given(st.data())
def test_files_of_heads(place: Path, data: Any) -> None:
    content = as_json(data.draw(changed(HEADS)))
    (place / "heads.json").write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
    accepted_or_refused(lambda: read_heads(place / "heads.json"), content)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(place: Path) -> dict[str, Path]:
    """An adapter of every kind of gate, and of LoRA."""
    from peft import LoraConfig

    found = {}
    for key in ("mode", "more", "poly", "smora"):
        config = Variant(key).config(target_modules=["lin0", "lin1"], init_weights=False)
        get_peft_model(MLP(), config).save_pretrained(place / key)
        found[key] = place / key
    get_peft_model(MLP(), LoraConfig(target_modules=["lin0"])).save_pretrained(place / "lora")
    found["lora"] = place / "lora"
    return found


def read(path: Path, out: Path) -> None:
    """What `inspect` and `export` do with an adapter."""
    adapter = SavedAdapter.read(path)
    visible = inspect(adapter)
    assert visible.modules
    shutil.rmtree(out, ignore_errors=True)
    export(adapter, out, task=adapter.task_names[0] if adapter.task_names else None)


@given(st.sampled_from(["mode", "more", "poly", "smora", "lora"]), st.data())
def test_configs_of_adapters(adapters: dict[str, Path], place: Path, key: str, data: Any) -> None:
    path = adapters[key] / "adapter_config.json"
    kept = path.read_bytes()
    document = data.draw(changed(json.loads(kept)))
    content = as_json(document)
    try:
        path.write_bytes(data.draw(damaged(content)) if data.draw(st.booleans()) else content)
        accepted_or_refused(lambda: read(adapters[key], place / "out"))
    finally:
        path.write_bytes(kept)


@given(st.sampled_from(["mode", "more", "poly", "lora"]), st.data())
def test_weights_of_adapters(adapters: dict[str, Path], place: Path, key: str, data: Any) -> None:
    path = adapters[key] / "adapter_model.safetensors"
    kept = path.read_bytes()
    size = int.from_bytes(kept[:8], "little")
    header = data.draw(changed(json.loads(kept[8 : 8 + size])) | damaged(kept[8 : 8 + size]))
    header = header if isinstance(header, bytes) else as_json(header)
    length = data.draw(st.sampled_from([len(header), size, 0, 2**40, 2**63]))
    body = data.draw(damaged(kept[8 + size :]))
    try:
        path.write_bytes(length.to_bytes(8, "little") + header + body)
        accepted_or_refused(lambda: read(adapters[key], place / "out"))
    finally:
        path.write_bytes(kept)


@given(st.data())
def test_tensors_of_adapters(adapters: dict[str, Path], place: Path, data: Any) -> None:
    """Weights with another shape, type or value, which safetensors itself reads."""
    import torch
    from safetensors.torch import load_file

    key = data.draw(st.sampled_from(["mode", "more", "poly", "lora"]))
    path = adapters[key] / "adapter_model.safetensors"
    kept, weights = path.read_bytes(), load_file(path)
    for name in data.draw(st.lists(st.sampled_from(sorted(weights)), max_size=2)):
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]))
        weights[name] = torch.full(shape, data.draw(st.sampled_from([0.0, 1.0, float("nan"), float("inf")]))).to(dtype)
    try:
        save_file(weights, path)
        accepted_or_refused(lambda: read(adapters[key], place / "out"))
    finally:
        path.write_bytes(kept)


# --- run folders ------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.yaml", "env.json", "log.jsonl", "scores.json", "predictions/t.jsonl", "manifest.json")


@pytest.fixture(scope="module")
def scored(place: Path) -> Path:
    folder = write_run(place / "scored", "a", {"t": [1, 2]}, losses=[(step, 1.0 / step) for step in range(1, 30)])
    folder.write_environment(tasks=["t"], seed=0)
    task = Task("t", 1, (), (), (), "rouge_l", ("rouge_l",), template=Template(texts=("{instruction}: {input}",)))
    folder.write_templates([task])
    folder.append_log({"event": "trained", "step": 29, "seconds": 3.0, "parameters": 1000})
    folder.append_log({"event": "validated", "step": 29, "validation_loss": 1.5})
    folder.append_log({"event": "adapted", "similarity": {"t": {"u": 0.5}}})
    return folder.path


def look(path: Path) -> None:
    """Everything that is read from a run folder without its model."""
    folder = RunFolder.open(path)
    folder.recipe()
    folder.write_environment(seed=1)
    folder.task_names()
    folder.templates()
    folder.log()
    for form in FORMATS.values():
        form(compare([path]))
    state_of(Cell(path.name, folder.recipe()), StudyFolder(path.parent))
    validation_loss(folder)
    _curve(folder)
    seconds_until(path / "checkpoint-9", folder)
    shown("show", path, "--task", "t", "--whole")
    shown("show", path, "--json")


@given(st.sampled_from([*RUN_FILES, "templates.json"]), st.booleans(), st.data())
def test_files_of_run_folders(scored: Path, place: Path, name: str, trusted: bool, data: Any) -> None:
    run = place / "changed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(scored, run)
    content = (run / name).read_bytes()
    if name.endswith(".json"):
        content = as_json(data.draw(changed(json.loads(content))))
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in content.splitlines()]
        drawn = data.draw(changed(rows))
        content = b"\n".join(map(as_json, drawn if isinstance(drawn, list) else [drawn])) + b"\n"
    if data.draw(st.booleans()):
        content = data.draw(damaged(content))
    (run / name).write_bytes(content)
    if trusted and name != "manifest.json":
        accept(run)  # as if the library had written it so
    accepted_or_refused(lambda: look(run), content)


QUESTIONS = [
    {"task": "t", "input": "a", "id": 1},
    {"task": "t", "instruction": "b", "input": "c", "prediction": "d"},
    {"prompt": "a: b", "task": 0},
    {"prompt": ["a", "b"]},
]


@given(
    st.sampled_from([".jsonl", ".csv"]),
    st.lists(st.sampled_from(QUESTIONS).flatmap(changed), max_size=4),
    st.data(),
)
def test_files_of_questions(scored: Path, place: Path, suffix: str, rows: list[Any], data: Any) -> None:
    """Up to the model that answers them."""
    content = b"\n".join(map(as_json, rows)) if suffix == ".jsonl" else b"task,instruction,input\nt,a,b\n"
    content = data.draw(damaged(content))
    path = place / f"questions{suffix}"
    path.write_bytes(content)
    folder = RunFolder(scored)

    def read_questions() -> None:
        questions = generate_verb._read(path, None)
        form = generate_verb._Forms(folder)
        questions = [form.of_only_task(question) for question in questions]
        generate_verb._check_tasks(folder, questions, "error")
        for question in questions:
            form.example(question)

    accepted_or_refused(read_questions, content)
