# SPDX-License-Identifier: Apache-2.0
"""Verification of what a core declares: `looks_at`, `linear_scores` and `closed_form`, tried on random samples.

A gate that reads more than `looks_at` says would be merged wrongly; a parameter that `select` or `mix` reads would
silently not train; the wrong derivative would silently train towards something else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from dyads.errors import ConfigError
from dyads.methods.core import Core

__all__ = ["check_declarations"]


def check_declarations(core: Core, d: int, num_tasks: int) -> None:
    """ConfigError where a declaration of the core does not hold, for a layer of d features.

    Tried in training and evaluation, for rows and for samples of several tokens. The core and the global random state
    stay as they are. On the meta device only what needs no values is tried.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [*core.parameters(), *core.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    probe = copy.deepcopy(core)
    if device.type == "meta":
        probe = probe.to("meta")  # PEFT's low_cpu_mem_usage leaves buffers on the CPU
    probe = probe.float().requires_grad_(True)  # an adapter that is not active is frozen
    # Other processes may create no adapter now, and a sum over processes would wait for them.
    probe.add_up_processes = lambda: None  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in probe.parameters():
            # Matrices that give scores of unit variance, whatever the width; vectors and numbers, such as a bias that
            # starts at zero or a temperature, between 0.5 and 1.
            if parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator, device="cpu") * parameter.shape[-1] ** -0.5
            else:
                drawn = torch.rand(parameter.shape, generator=generator, device="cpu") * 0.5 + 0.5
            parameter.copy_(drawn)
    task = torch.tensor([0, num_tasks - 1], device=device) if num_tasks else None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(device)

    for training in (False, True):
        probe.train(training)
        for rows in ((2,), (2, 3)):
            h, x, du = draw(*rows, core.p), draw(*rows, d), draw(*rows, core.q)
            if core.linear_scores:
                _check_linear(probe, h, x, task, du)
            if device.type != "meta":
                _check_looks_at(probe, h, x, task, draw)


def _check_looks_at(probe: Core, h: Tensor, x: Tensor, task: Tensor | None, draw: Callable[..., Tensor]) -> None:
    others = {"x": (h, draw(*x.shape), task), "h": (draw(*h.shape), x, task)}
    if task is not None and task[0] != task[1]:
        others["task"] = (h, x, task.flip(0))
    with torch.no_grad():
        g = probe.route(h, x, task)
        for seen, changed in others.items():
            if seen not in probe.looks_at and not _same(g, probe.route(*changed)):
                raise ConfigError(
                    f"{type(probe).__name__} declares looks_at = {sorted(probe.looks_at)}, but its gates change with"
                    f" {seen}: add '{seen}' to looks_at, by which merging is allowed or refused"
                )


def _check_linear(probe: Core, h: Tensor, x: Tensor, task: Tensor | None, du: Tensor) -> None:
    name = type(probe).__name__
    with torch.no_grad():
        found = Core.score(probe, h, x), probe.task_scores(task)
        scores, task_scores = (None if t is None else t.detach() for t in found)  # which may be a parameter itself
    with torch.enable_grad():
        u = probe.mix(h, probe.select(h, scores, task_scores))
    if u.requires_grad:
        raise ConfigError(
            f"{name} declares linear_scores, but its select or mix reads a parameter, which would get no gradient:"
            " set linear_scores = False, or read the parameter in router_weight or task_scores"
        )
    if u.is_meta:
        return
    with torch.no_grad():
        if not _same(u, probe.mix(h, probe.route(h, x, task))):
            raise ConfigError(
                f"{name} declares linear_scores, but its route differs from select(h, R {probe.router_input},"
                " task_scores(task)): set linear_scores = False"
            )
        z = h if scores is None else torch.cat([h, scores], -1)
        columns = probe.mix_columns(z.reshape(-1, z.shape[-1]).t().contiguous()) if task_scores is None else None
        if columns is not None and not _same(columns.t(), u.reshape(-1, u.shape[-1])):
            raise ConfigError(
                f"{name} has a mix_columns that differs from its mix and select: override it too, or return None"
            )
    if probe.closed_form:
        _check_gradients(probe, h, scores, task_scores, du)


def _check_gradients(probe: Core, h: Tensor, scores: Tensor | None, task_scores: Tensor | None, du: Tensor) -> None:
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        scores, task_scores = (None if t is None else t.detach().requires_grad_() for t in (scores, task_scores))
        leaves = [t for t in (h, scores, task_scores) if t is not None]
        g = probe.select(h, scores, task_scores)
        wanted = torch.autograd.grad(probe.mix(h, g), leaves, du, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        dh, ds = probe.gradients(h, g.detach(), du)
    # The gradient for a sample's task scores is that of the scores, summed over its tokens.
    of_tasks = [ds.flatten(1, -2).sum(1) if ds.ndim > 2 else ds] if task_scores is not None else []
    found = [dh, *([] if scores is None else [ds]), *of_tasks]
    if not all(
        torch.allclose(ours.reshape(theirs.shape), theirs, rtol=1e-3, atol=1e-4)
        for ours, theirs in zip(found, wanted, strict=True)
    ):
        raise ConfigError(
            f"{type(probe).__name__} declares closed_form, but its gradients are not the derivative of its select and"
            " mix: set closed_form = False, or override gradients too"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
