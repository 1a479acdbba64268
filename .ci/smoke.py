# SPDX-License-Identifier: Apache-2.0
"""Smoke test of the installed wheel: import, `dyads --help`, two steps of training, and its adapter in PEFT.

Run it with the Python of an environment that has dyads installed and nothing else (`make wheel`). It takes nothing from
this repository: the base model is made here, with a token for every byte.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import dyads

RECIPE = """\
name: smoke
model: {{name: "{model}", dtype: float32}}
method: {{name: mode, r: 2, num_experts: 3, target_modules: [q_proj, v_proj]}}
tasks: {{family: starter, names: [first_word], train_per_task: 8, validation_per_task: 2, test_per_task: 2}}
train: {{steps: 2, batch_size: 4, logging_steps: 1}}
evaluate: {{batch_size: 4, max_new_tokens: 4}}
"""


def dyads_command(*arguments: object) -> str:
    """The output of the installed command `dyads`."""
    command = [str(Path(sys.executable).parent / "dyads"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def save_model(path: Path) -> None:
    """A folder with a tiny Llama and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*marks, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(path)


def main() -> None:
    """Each part in turn; an error ends the script."""
    package = Path(dyads.__file__).parent
    if not package.is_relative_to(sys.prefix):
        raise SystemExit(f"dyads is imported from {package}, not from the environment {sys.prefix}")
    if metadata.version("dyads") != dyads.__version__:
        raise SystemExit(f"the distribution is {metadata.version('dyads')}, the package {dyads.__version__}")
    for name in dir(dyads):
        getattr(dyads, name)
    if "train" not in dyads_command("--help"):
        raise SystemExit("`dyads --help` does not list train")
    with tempfile.TemporaryDirectory() as folder:
        model, run, recipe = Path(folder) / "model", Path(folder) / "run", Path(folder) / "smoke.yaml"
        save_model(model)
        recipe.write_text(RECIPE.format(model=model.as_posix()), encoding="utf-8")
        dyads_command("train", recipe, "--out", run)
        losses = [
            line["loss"] for line in map(json.loads, (run / "log.jsonl").open(encoding="utf-8")) if "loss" in line
        ]
        if len(losses) != 2:
            raise SystemExit(f"{run}/log.jsonl has {len(losses)} losses of 2 steps")
        check_adapter(model, run / "adapter")
    print(f"dyads {dyads.__version__} from its wheel: imported, trained two steps, loaded in PEFT")


def check_adapter(model: Path, adapter: Path) -> None:
    """The trained adapter loads in PEFT and changes the base model's logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, adapter)(ids).logits
    if torch.equal(before, after):
        raise SystemExit(f"the adapter in {adapter} changes nothing")


if __name__ == "__main__":
    main()
