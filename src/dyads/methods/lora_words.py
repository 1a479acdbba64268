# SPDX-License-Identifier: Apache-2.0
"""PEFT's words: fields of LoraConfig that mean the same for every method, and those that are refused with a reason."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils.other import get_pattern_key

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LoraWords"]

_REFUSED = {
    "bias": "trains biases of the base model, which are no part of an adapter that is switched, scaled or merged: name"
    " their modules in modules_to_save, and leave this at 'none'",
    "target_parameters": "names packed parameters, such as experts, and dyads adapts linear layers only: leave it out",
    "use_dora": "rescales each row of the base weight with the update in it, and gates change that update for every"
    " token or task: leave it out",
    "lora_bias": "would give B a bias that no gate weighs: leave it out",
    "layer_replication": "changes the base model and not the adapter: repeat its layers before you add an adapter",
}
_STARTS = (True, False, "gaussian")


@dataclasses.dataclass
class LoraWords(PeftConfig):  # type: ignore[misc]
    """Fields with the names and meanings of PEFT's LoraConfig."""

    use_rslora: bool = dataclasses.field(
        default=False, metadata={"help": "Scale by lora_alpha / √r in place of lora_alpha / r."}
    )
    init_lora_weights: bool | str = dataclasses.field(
        default=True,
        metadata={
            "help": "PEFT's name for the start: true (B = 0), false (as init_weights: false) or gaussian (B = 0 and"
            " init_std: 1/r)."
        },
    )
    rank_pattern: dict[str, int] = dataclasses.field(
        default_factory=dict, metadata={"help": "Ranks of single layers, by their names or regular expressions."}
    )
    alpha_pattern: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={"help": "lora_alpha of single layers, by their names or regular expressions."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = dataclasses.field(
        default=None, metadata={"help": "Tokens whose embeddings train and are saved beside the adapter."}
    )
    ensure_weight_tying: bool = dataclasses.field(
        default=False, metadata={"help": "Keep tied embeddings tied where modules_to_save names them."}
    )
    # Accepted with these values only, as configs written for LoRA have them.
    bias: str = "none"
    target_parameters: list[str] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    layer_replication: list[tuple[int, int]] | None = None

    def check_words(self) -> None:
        """Refuse what does not apply, and carry `init_lora_weights` over to our fields."""
        config: Any = self  # a DyadsConfig
        for name, reason in _REFUSED.items():
            allowed = getattr(LoraWords, name)
            config.require(getattr(self, name) in (allowed, [], ()) or getattr(self, name) is allowed, name, reason)
        config.require(isinstance(self.use_rslora, bool), "use_rslora", "must be true or false")
        config.require(
            not self.use_rslora or config.lora_alpha is not None,
            "use_rslora",
            "scales by lora_alpha / √r, and lora_alpha is None: set it (a scale of 1 needs no rank)",
        )
        for name in ("rank_pattern", "alpha_pattern"):
            config.require(isinstance(getattr(self, name), dict), name, "must map names of layers to numbers")
        config.require(
            self.init_lora_weights in _STARTS,
            "init_lora_weights",
            "must be true, false or gaussian: other starts factorise the base weight into one A and one B, and a"
            " mixture has several",
        )
        if self.init_lora_weights is False:
            config.init_weights = False
        if self.init_lora_weights == "gaussian":
            config.init_std = 1 / config.r

    def for_layer(self, path: str) -> Self:
        """This config with the rank and lora_alpha that the patterns give to the layer of that path."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        config: Any = self
        r = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), path), config.r)
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), path), config.lora_alpha)
        return dataclasses.replace(config, r=r, lora_alpha=alpha, rank_pattern={}, alpha_pattern={})  # type: ignore[no-any-return]
