# SPDX-License-Identifier: Apache-2.0
"""Model for lm-evaluation-harness: a run answers each of the harness's tasks as one of its own.

    lm_eval run --model dyads --model_args run=RUN --tasks boolq
    python -m dyads.scoring.harness run …      # the same, for versions of the harness that read no entry points

The harness makes the prompts, and chooses or generates as for any model of transformers (its HFLM); the gates get the
task of that name, or the one that `task=` names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from lm_eval.models.huggingface import HFLM

from dyads.errors import ConfigError, did_you_mean
from dyads.runs.folder import RunFolder
from dyads.scoring.answerer import Answerer
from dyads.tuner import use_task

__all__ = ["HarnessModel"]


class HarnessModel(HFLM):  # type: ignore[misc]
    """The model and adapter of the run in the folder `run`; further arguments are HFLM's (batch_size, max_length, …).

    `task` names the run's task that all answers are for; without it each is for the task with the harness's name.
    """

    def __init__(self, run: str, task: str | None = None, **options: Any) -> None:
        folder = RunFolder.open(run)
        answerer = Answerer(folder)
        if answerer.heads:
            raise ConfigError(
                f"'{folder.path}' answers by the heads of an encoder, and the harness needs a language model: score it"
                f" with `dyads evaluate {folder.path}`"
            )
        if (template := folder.chat_template()) is not None:
            answerer.tokenizer.chat_template = template  # for --apply_chat_template
        self.task_names = answerer.task_names if answerer.needs_task else ()
        if task is not None and task not in (self.task_names or folder.task_names()):
            raise ConfigError(f"'{folder.path}' does not know task '{task}'{did_you_mean(task, self.task_names)}")
        self.run_folder, self.task = folder, task
        super().__init__(pretrained=answerer.model, tokenizer=answerer.tokenizer, **options)

    def loglikelihood(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
        return self._by_task(super().loglikelihood, requests, *args, **options)

    def loglikelihood_rolling(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
        return self._by_task(super().loglikelihood_rolling, requests, *args, **options)

    def generate_until(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
        return self._by_task(super().generate_until, requests, *args, **options)

    def _by_task(
        self, answer: Callable[..., list[Any]], requests: Sequence[Any], *args: Any, **options: Any
    ) -> list[Any]:
        """The answers to requests, in their order, computed for one task after another."""
        names = [self._own_name(request.task_name) for request in requests]
        answers: list[Any] = [None] * len(requests)
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            with nullcontext() if name is None else use_task(self.model, name):
                found = answer([requests[i] for i in places], *args, **options)
            for i, one in zip(places, found, strict=True):
                answers[i] = one
        return answers

    def _own_name(self, name: str | None) -> str | None:
        """The run's task for a task of the harness; None where the gates do not depend on it."""
        if not self.task_names:
            return None
        wanted = self.task or name
        if wanted not in self.task_names:
            raise ConfigError(
                f"'{self.run_folder.path}' has no task with the harness's name '{wanted}'"
                f"{did_you_mean(str(wanted), self.task_names)}; name one in --model_args (run=…,task=NAME)"
            )
        return wanted


def main() -> None:
    """The command line of the harness, with this model."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry, register_model

    if "dyads" not in model_registry:
        register_model("dyads")(HarnessModel)
    cli_evaluate()


if __name__ == "__main__":
    main()
