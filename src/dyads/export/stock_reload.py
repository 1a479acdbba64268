# SPDX-License-Identifier: Apache-2.0
"""Script: logits of exported folders as transformers and stock PEFT load them, in a process without dyads.

    python stock_reload.py CASES.json

A case has `auto` (a class of transformers), `base` and `revision`, `lora` (None: `base` is a merged checkpoint),
`inputs` (a safetensors file, one tensor per prompt) and `logits` (the file to write). The weights are read as float32.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(path: str) -> None:
    """Write the logits of every case in a file."""
    sys.path.pop(0)  # the folder of this script, which is a package of dyads
    sys.modules["dyads"] = None  # type: ignore[assignment]  # from here on `import dyads` is an ImportError
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    from_pretrained = {"dtype": torch.float32, "trust_remote_code": False}
    transformers.utils.logging.disable_progress_bar()
    with open(path, encoding="utf-8") as file:
        cases: list[dict[str, Any]] = json.load(file)
    loaded: tuple[str, Any] = ("", None)
    for number, case in enumerate(cases):
        if loaded[0] != case["base"]:
            auto = getattr(transformers, case["auto"])
            base = auto.from_pretrained(case["base"], revision=case["revision"], **from_pretrained)
            loaded = (case["base"], base.eval())
        model = loaded[1]
        if case["lora"] is not None:
            if isinstance(model, PeftModel):  # one LoRA at a time
                before = model.active_adapter
                model.load_adapter(case["lora"], str(number))
                model.set_adapter(str(number))
                model.delete_adapter(before)
            else:
                model = PeftModel.from_pretrained(model, case["lora"], adapter_name=str(number))
            loaded = (case["base"], model.eval())
        logits = {}
        with torch.inference_mode():
            for name, ids in load_file(case["inputs"]).items():
                decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
                output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **decoder)
                logits[name] = output[0][0, -case["last"] :].float().contiguous()
        save_file(logits, case["logits"])


if __name__ == "__main__":
    main(sys.argv[1])
