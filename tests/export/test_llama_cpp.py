# SPDX-License-Identifier: Apache-2.0
"""llama.cpp with an exported GGUF adapter writes the greedy answers of PEFT, on fifty prompts of a real model.

Slow, and skipped where no Python has llama-cpp-python: $LLAMA_CPP_PYTHON names one, else it is this one. Its package is
compiled when it is installed, in about 15 minutes on two cores: `pip install llama-cpp-python` into an environment of
its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from dyads.export import export_all
from dyads.export.gguf_adapter import GGUF_ADAPTER, gguf_layout
from dyads.models.packaged import PACKAGED, resolve
from dyads.recipe.spec import Recipe
from dyads.runs.folder import RunFolder
from dyads.runs.saved import SavedAdapter
from dyads.scoring.answerer import Answerer
from dyads.tasks import load
from dyads.training.train import train

MODEL = "packaged:smollm2-135m"
TASKS = ("first_word", "last_word", "reverse_words", "sort_words", "count_words")
LONGEST = 16

# Greedy answers of llama.cpp, with all of its computation in float32: [[adapter or null, [prompt ids, …]], …].
ENGINE = """
import itertools, json, sys
import llama_cpp
given = json.load(open(sys.argv[1]))
single = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "n_ctx": 512, "n_threads": 1}
answers, read = [], []
for adapter, prompts in given["cases"]:
    model = llama_cpp.Llama(given["base"], lora_path=adapter, verbose=False, **single)
    read.append([model.tokenize(text.encode(), add_bos=False, special=True) for text in given["texts"]])
    answers.append([])
    for ids in prompts:
        model.reset()
        found = []
        for token in itertools.islice(model.generate(ids, temp=0.0, repeat_penalty=1.0), given["longest"]):
            found.append(token)
            if token in given["ends"]:
                break
        answers[-1].append(found)
    model.close()
json.dump({"answers": answers, "read": read[0]}, open(sys.argv[2], "w"))
"""


def engine() -> str | None:
    """A Python that has llama_cpp."""
    if given := os.environ.get("LLAMA_CPP_PYTHON"):
        return given
    return sys.executable if importlib.util.find_spec("llama_cpp") is not None else None


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows i and i + d/2 of every head side by side, one index after the other."""
    size = len(rows) // heads
    order = [h * size + i + half for h in range(heads) for i in range(size // 2) for half in (0, size // 2)]
    return rows[order]


def write_base(path: Path) -> None:
    """The packaged model as GGUF with the weights of its transformers checkpoint in float32.

    Names, tokenizer and settings are those of the package's own file, whose quantised weights must be near.
    """
    import gguf

    spec = importlib.util.find_spec(PACKAGED["smollm2-135m"].module)
    assert spec is not None
    source = gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / PACKAGED["smollm2-135m"].place)  # type: ignore[index]
    weights = load_file(Path(resolve(MODEL)) / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    ours = {names.get_name(key, (".weight",)): value.float() for key, value in weights.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for key, field in source.fields.items():
        if not key.startswith(("GGUF.", "general.")):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if array else None)
    for tensor in source.tensors:
        value = ours.pop(tensor.name)
        heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2])
        value = interleaved(value, heads) if heads else value
        there = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert_close(value, there.view_as(value), rtol=2**-8, atol=0)  # rounded to bfloat16
        writer.add_tensor(tensor.name, value.contiguous().numpy())
    assert not ours
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peft_answers(folders: dict[str, Path], prompts: dict[str, list[list[int]]], ends: list[int]) -> list[list[int]]:
    """Greedy answers of transformers with the LoRA of every task, without dyads' layers."""
    base = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32, attn_implementation="eager")
    model, found = None, []
    for task, several in prompts.items():
        if model is None:
            model = PeftModel.from_pretrained(base, folders[task], adapter_name=task).eval()
        else:
            model.load_adapter(folders[task], task)
            model.set_adapter(task)
        for prompt in several:
            ids = torch.tensor([prompt])
            options: dict[str, Any] = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
            mask = torch.ones_like(ids)
            output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST, **options)
            found.append(output[0, len(prompt) :].tolist())
    return found


def compare(run: RunFolder, prompts: dict[str, list[list[int]]], ends: list[int], place: Path) -> dict[str, Any]:
    """Answers to every task's prompts by PEFT and llama.cpp, and to every fifth by llama.cpp without an adapter."""
    adapter, python = SavedAdapter.read(run.path), engine()
    assert python is not None
    write_base(place / "base.gguf")
    loras = {str(one.task): one.path for one in export_all(adapter, place / "loras", gguf=gguf_layout(adapter, run))}
    tokenizer = Answerer(run).tokenizer
    every = [ids for task in prompts for ids in prompts[task]]
    given = {
        "base": str(place / "base.gguf"),
        "cases": [[None, every[::5]], *[[str(loras[task] / GGUF_ADAPTER), prompts[task]] for task in prompts]],
        "texts": [tokenizer.decode(ids) for ids in every],
        "ends": ends,
        "longest": LONGEST,
    }
    (place / "given.json").write_text(json.dumps(given))
    command = [python, "-c", ENGINE, str(place / "given.json"), str(place / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((place / "found.json").read_text())
    assert found["read"] == every, "llama.cpp reads the prompts' text as the same tokens"
    base, *adapted = found["answers"]
    return {
        "peft": peft_answers(loras, prompts, ends),
        "llama.cpp": [a for answers in adapted for a in answers],
        "llama.cpp, base": base,
        "texts": given["texts"],
    }


@pytest.mark.slow
def test_llama_cpp_answers_as_peft_does_on_fifty_prompts(tmp_path: Path) -> None:
    if engine() is None:
        pytest.skip("llama-cpp-python is not installed, and LLAMA_CPP_PYTHON names no Python that has it")
    if importlib.util.find_spec(PACKAGED["smollm2-135m"].module) is None:
        pytest.skip("the packaged model is not installed")
    sizes = {"train_per_task": 80, "validation_per_task": 1, "test_per_task": 10}
    recipe = Recipe.model_validate(
        {
            "name": "mtl",
            "model": {"name": MODEL, "dtype": "float32"},
            "method": {"name": "mtl_lora", "r": 4, "num_experts": 2, "target_modules": "all-linear"},
            "tasks": {"family": "starter", "names": TASKS, **sizes},
            "train": {"steps": 40, "batch_size": 8, "learning_rate": 4e-3, "trainer": {"disable_tqdm": True}},
            "evaluate": {"max_new_tokens": LONGEST},
        }
    )
    run = train(recipe, tmp_path / "run", evaluate=False)
    reader = Answerer(run).prompt_tokenizer
    prompts = {task.name: [reader.prompt(example) for example in task.test] for task in load(recipe.tasks)}
    found = compare(run, prompts, list(reader.ends), tmp_path)
    assert len(found["peft"]) == 50
    changed = sum(ours != base for ours, base in zip(found["peft"][::5], found["llama.cpp, base"], strict=True))
    assert changed > 5, "the adapter changes most answers"
    assert found["llama.cpp"] == found["peft"]
