# SPDX-License-Identifier: Apache-2.0
"""Contenders and settings: the adapted models that are measured, and how each is built.

A contender is plain data, so that it can be sent to a process of its own. Its size may be left open (`solve`): then it
is set to train as many parameters as the setting's budget, routers, gates and embeddings included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

TASKS = 8
"""Tasks that task-conditioned methods know."""


@dataclass(frozen=True)
class Contender:
    """One adapted model: `builder` names its library and method, `options` are the fields of its PEFT config."""

    label: str
    builder: str
    options: dict[str, Any] = field(default_factory=dict)
    solve: str | None = None
    """The option that is set to meet the budget: r or num_experts; 'r/8' for 8 experts in PEFT's own classes."""
    tasks: str = "none"
    """none, one (the whole batch has the same task) or mixed (row i has task i modulo 8)."""
    metrics: tuple[str, ...] = ("step", "forward", "decode")
    slowness: float = 1.0
    """About how many times the setting's `seconds` a step and a forward pass take; for the estimate only."""


@dataclass(frozen=True)
class Setting:
    """A base model, a batch, and contenders in groups that are measured together."""

    title: str
    about: str
    """What a reader needs to know to read the table."""
    model: str
    """A name that dyads loads; or `llama`, built from `config` with random weights."""
    targets: tuple[str, ...]
    batch: int
    width: int
    dtype: str
    attention: str
    threads: int
    reference: str
    """The contender that every ratio is taken to; it is in every group."""
    budget: str
    """The contender whose trainable parameters the others get."""
    contenders: dict[str, Contender]
    groups: dict[str, tuple[str, ...]]
    config: dict[str, int] = field(default_factory=dict)
    prompt: int = 32
    new_tokens: int = 32
    lives: int = 8
    """Rounds for which a process lives: it may be faster or slower than others of its kind for that long (LOG.md)."""
    seconds: dict[str, float] = field(default_factory=lambda: {"start": 3, "step": 0.1, "forward": 0.1, "decode": 0.1})
    """About how long a process takes to start, and the reference for each metric; for the estimate only."""


WITHOUT_STEP = ("forward", "decode")

_RIVALS = {
    "frozen": Contender("frozen model", "frozen", metrics=WITHOUT_STEP),
    "lora-bf16": Contender(
        "PEFT LoRA, equal parameters, bf16 adapters", "lora", {"autocast_adapter_dtype": False}, solve="r"
    ),
    "poly": Contender("PEFT Poly, 8 skills", "peft-poly", {"n_skills": 8}, solve="r/8", tasks="mixed"),
    "mhr": Contender(
        "PEFT MHR, 8 skills, 8 heads", "peft-poly", {"n_skills": 8, "n_splits": 8}, solve="r/8", tasks="mixed"
    ),
    # It decodes some two tokens a second, which would take longer than all the rest.
    "xlora": Contender(
        "PEFT X-LoRA, 8 trained experts", "xlora", {"experts": 8}, "r/8", metrics=("step", "forward"), slowness=5
    ),
    "arrow": Contender("PEFT Arrow, 8 fixed experts", "arrow", {"experts": 8}, solve="r/8", metrics=WITHOUT_STEP),
}
_OURS = {
    "molora-sd": Contender(
        "MoLORA-SD (HydraLoRA), 8 experts", "molora", {"num_experts": 8, "shared_down": True}, solve="r"
    ),
    "more": Contender("MoRE, a batch of one task", "more", {"num_tasks": TASKS}, solve="r", tasks="one"),
    "more-mixed": Contender("MoRE, a batch of 8 tasks", "more", {"num_tasks": TASKS}, solve="r", tasks="mixed"),
    "more-merged": Contender(
        "MoRE merged for a task", "more", {"num_tasks": TASKS, "merged": True}, solve="r", metrics=WITHOUT_STEP
    ),
}

_RELATIVES = {
    # Its experts share the rank, which they must divide.
    "moelora": Contender(
        "MOELoRA, 8 experts", "moelora", {"r": 64, "num_experts": 8, "num_tasks": TASKS}, tasks="mixed"
    ),
    "mtl-lora": Contender("MTL-LoRA, 3 up-projections", "mtl_lora", {"num_tasks": TASKS}, solve="r", tasks="mixed"),
    "smora": Contender("SMoRA, 8 ranks a token", "smora", {"top_k": 8}, solve="r"),
    "poly-ours": Contender("Poly, 8 skills", "poly", {"num_experts": 8, "num_tasks": TASKS}, solve="r", tasks="mixed"),
    "task-mode": Contender(
        "TaskMoDE of rank 8", "task_mode", {"r": 8, "num_tasks": TASKS}, solve="num_experts", tasks="mixed"
    ),
    "comol": Contender("CoMoL, 8 cores", "comol", {"num_experts": 8, "lora_dropout": 0.0}, solve="r"),
    "hmora": Contender(
        "HMoRA, 8 experts", "hmora", {"num_experts": 8, "lora_dropout": 0.0, "num_tasks": TASKS}, "r", tasks="mixed"
    ),
}

SMOLLM2 = Setting(
    title="SmolLM2-135M, bf16, q/k/v/o, batch 8×128, two threads",
    about=(
        "Adapters are in fp32 unless a row says otherwise, which is PEFT's default. PEFT then multiplies in fp32; dyads"
        " casts the adapter's weights and multiplies in bf16, as the base model does. Adapters in bf16 have gradients"
        " and optimizer states in bf16 too."
    ),
    model="packaged:smollm2-135m",
    targets=("q_proj", "k_proj", "v_proj", "o_proj"),
    batch=8,
    width=128,
    dtype="bfloat16",
    attention="eager",
    threads=2,
    reference="lora",
    budget="mode-16x4",
    contenders={
        "lora": Contender("PEFT LoRA, equal parameters (r=66)", "lora", solve="r"),
        # 66 ranks fill no tile of a matrix unit; 64 do, with 3 % fewer parameters.
        "lora-64": Contender("PEFT LoRA r=64", "lora", {"r": 64}),
        "lora-rank": Contender("PEFT LoRA of equal rank", "lora", {"r": 4}),
        **_RIVALS,
        "mode-16x4": Contender("MoDE 16x4", "mode", {"r": 4, "num_experts": 16}),
        "mode-bf16": Contender(
            "MoDE 16x4, bf16 adapters", "mode", {"r": 4, "num_experts": 16, "autocast_adapter_dtype": False}
        ),
        "mode-grouped": Contender("MoDE, rank 16 in groups of 4", "mode", {"r": 16, "group_size": 4}, "num_experts"),
        "molora": Contender("MoLORA, 8 experts", "molora", {"num_experts": 8}, solve="r"),
        **_OURS,
        "mode-4x4": Contender("MoDE of rank 4, 4 experts", "mode", {"r": 4, "num_experts": 4}, metrics=("step",)),
        "mode-64x4": Contender("MoDE of rank 4, 64 experts", "mode", {"r": 4, "num_experts": 64}, metrics=("step",)),
    },
    groups={
        # The closest bars stand between these three.
        "main": ("lora", "mode-16x4", "lora-bf16"),
        "variants": ("lora", "mode-bf16", "lora-64"),
        "family": ("lora", "lora-rank", "molora", "molora-sd"),
        "growth": ("lora", "mode-4x4", "mode-64x4"),
        "tasks": ("lora", "mode-grouped", "more", "more-mixed"),
        "merged": ("lora", "more-merged", "frozen"),
        "rivals": ("lora", "poly", "mhr", "arrow"),
        "xlora": ("lora", "xlora"),  # it takes 7 GB by itself
    },
    seconds={"start": 14, "step": 1.6, "forward": 0.6, "decode": 2.5},
)

LLAMA = Setting(
    title="Llama-shaped (width 576, 4 layers, vocabulary 2,048), fp32, all linears, batch 4×128, one thread",
    about="Poly mixes skills of rank 8 once for every example; the mixtures and LoRA multiply every token by rank 64.",
    model="llama",
    config={
        "hidden_size": 576,
        "num_hidden_layers": 4,
        "vocab_size": 2048,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 512,
    },
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    batch=4,
    width=128,
    dtype="float32",
    attention="sdpa",
    threads=1,
    reference="lora",
    budget="lora",
    contenders={
        "lora": Contender("PEFT LoRA r=64", "lora", {"r": 64}),
        "lora-rank": Contender("PEFT LoRA of equal rank", "lora", {"r": 8}),
        **{name: _RIVALS[name] for name in ("frozen", "poly", "mhr", "xlora", "arrow")},
        "molora-8x8": Contender("MoLORA 8x8", "molora", {"r": 8, "num_experts": 8}),
        "mode": Contender("MoDE of rank 8", "mode", {"r": 8}, solve="num_experts"),
        "mode-grouped": Contender("MoDE, rank 16 in groups of 4", "mode", {"r": 16, "group_size": 4}, "num_experts"),
        **_OURS,
        "more-mixed": replace(_OURS["more-mixed"], label="MoRE, a batch of 4 tasks"),  # one for every row
        **_RELATIVES,
    },
    groups={
        "main": ("lora", "molora-8x8", "mode", "poly"),  # Poly has no bar, but is the nearest rival
        "family": ("lora", "mode-grouped", "molora-sd", "more", "more-mixed", "lora-rank"),
        "rivals": ("lora", "frozen", "mhr", "arrow", "more-merged", "xlora"),
        "relatives": ("lora", "moelora", "mtl-lora", "smora", "poly-ours", "task-mode"),
        "newer": ("lora", "comol", "hmora"),
    },
    seconds={"start": 5, "step": 0.4, "forward": 0.2, "decode": 0.5},
)

TINY = Setting(
    title="tiny model, for trying the benchmark out; its numbers mean nothing",
    about="",
    model="llama",
    config={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    targets=("q_proj", "v_proj"),
    batch=2,
    width=8,
    dtype="float32",
    attention="eager",
    threads=1,
    reference="lora",
    budget="mode-16x4",
    contenders={
        "lora": SMOLLM2.contenders["lora"],
        **{name: _RIVALS[name] for name in ("frozen", "poly", "mhr", "xlora", "arrow")},
        "mode-16x4": Contender("MoDE 4x2", "mode", {"r": 2, "num_experts": 4}),
        "more-mixed": _OURS["more-mixed"],
        "more-merged": _OURS["more-merged"],
    },
    groups={
        "main": ("lora", "mode-16x4", "more-mixed", "more-merged"),
        "rivals": ("lora", "poly", "mhr", "xlora", "arrow", "frozen"),
    },
    prompt=4,
    new_tokens=3,
)

SETTINGS = {"smollm2": SMOLLM2, "llama": LLAMA, "tiny": TINY}


# --- sizes ------------------------------------------------------------------------------------------------------------


def resolved(setting: Setting, out: Path, only: Sequence[str]) -> dict[str, Contender]:
    """The contenders in `only`, with the sizes that the budget gives them."""
    from dyads.models.budget import count, solve

    model, targets = base_name(setting, out), list(setting.targets)

    def plain(c: Contender) -> dict[str, Any]:
        hidden = ("merged", "autocast_adapter_dtype", "experts", "n_skills", "n_splits")
        return {**{k: v for k, v in c.options.items() if k not in hidden}, "target_modules": targets}

    chosen = setting.contenders[setting.budget]
    budget = count(model, chosen.builder, plain(chosen)).trainable
    lora_r, _ = solve(model, "lora", {"target_modules": targets}, free="r", parameters=budget)
    found: dict[str, Contender] = {}
    for name in only:
        contender = setting.contenders[name]
        options = dict(contender.options)
        if contender.solve == "r/8":
            options["r"] = max(1, round(lora_r / 8))
        elif contender.builder == "lora" and contender.solve:
            options["r"] = lora_r
        elif contender.solve in ("r", "num_experts"):
            free: Any = contender.solve
            options[free], _ = solve(model, contender.builder, plain(contender), free=free, parameters=budget)
        found[name] = Contender(**{**asdict(contender), "options": options, "metrics": contender.metrics})
    return found


def base_name(setting: Setting, out: Path) -> str:
    """The base model's name for dyads; a model made from a config gets a folder that holds only the config."""
    if setting.model != "llama":
        return setting.model
    from transformers import LlamaConfig

    folder = out / "models" / "-".join(str(size) for size in setting.config.values())
    if not (folder / "config.json").is_file():
        LlamaConfig(**setting.config, bos_token_id=0, eos_token_id=1, pad_token_id=1).save_pretrained(folder)
    return str(folder)


# --- models -----------------------------------------------------------------------------------------------------------


def build_base(setting: Setting, out: Path) -> Any:
    """The frozen base model; one made from a config has the same weights every time."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from dyads.models.load import load_model
    from dyads.recipe.spec import ModelSpec

    if setting.model == "llama":
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(base_name(setting, out))
        model = AutoModelForCausalLM.from_config(config, attn_implementation=setting.attention)
        model = model.to(getattr(torch, setting.dtype)).requires_grad_(False)
    else:
        spec: dict[str, Any] = {"name": setting.model, "dtype": setting.dtype, "attention": setting.attention}
        model = load_model(ModelSpec(**spec))
    # Every contender generates the same number of tokens: no end token.
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return model


def build(setting: Setting, contender: Contender, out: Path) -> Any:
    """The contender's model, made as its user would make it, but with small random up-projections instead of zeros."""
    import torch
    from peft import get_peft_model

    base = build_base(setting, out)
    torch.manual_seed(1)
    options = dict(contender.options)
    common = {"target_modules": list(setting.targets), "task_type": "CAUSAL_LM"}
    if contender.builder == "frozen":
        return base
    if contender.builder == "lora":
        from peft import LoraConfig

        autocast = options.pop("autocast_adapter_dtype", True)
        config = LoraConfig(**common, **options, lora_alpha=options["r"])
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    elif contender.builder == "peft-poly":
        from peft import PolyConfig

        model = get_peft_model(base, PolyConfig(**common, **options, n_tasks=TASKS))
    elif contender.builder in ("xlora", "arrow"):
        with tempfile.TemporaryDirectory() as folder:
            experts = _saved_experts(base, common, options["r"], options["experts"], folder)
            model = _xlora(base, experts) if contender.builder == "xlora" else _arrow(base, experts)
    else:
        from dyads.methods import build_config

        merged, autocast = options.pop("merged", False), options.pop("autocast_adapter_dtype", True)
        config = build_config(contender.builder, {**options, **common})
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
        if merged:
            _start(model)
            return model.merge_and_unload(task=0)
    _start(model)
    return model


def _start(model: Any) -> None:
    """Set up-projections to small random numbers: at their usual start, 0, half of the gradients and Arrow's routing
    are 0 too."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)


def _saved_experts(base: Any, common: dict[str, Any], r: int, experts: int, folder: str) -> list[str]:
    """Folders of saved LoRA adapters, from which X-LoRA and Arrow load their experts."""
    from peft import LoraConfig, get_peft_model

    paths = []
    for number in range(experts):
        model = get_peft_model(base, LoraConfig(**common, r=r, lora_alpha=r))
        _start(model)
        paths.append(f"{folder}/{number}")
        model.save_pretrained(paths[-1], save_embedding_layers=False)
        base = model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config
    return paths


def _xlora(base: Any, experts: list[str]) -> Any:
    from peft import XLoraConfig, get_peft_model

    base.config.use_cache = False  # X-LoRA refuses a model that has it
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(i): path for i, path in enumerate(experts)},
        use_trainable_adapters=True,
    )
    return get_peft_model(base, config)


def _arrow(base: Any, experts: list[str]) -> Any:
    from peft import ArrowConfig, create_arrow_model

    return create_arrow_model(base, experts, ArrowConfig(top_k=3, rng_seed=0))
