# SPDX-License-Identifier: Apache-2.0
"""How is the same operator computed with less traffic?

Seven things differ from `dyadic`, and none of them changes the result beyond rounding:

- A and the router see the same input, so [A; W] x is one product;
- layers that see the same input, such as q, k and v, can be computed at once (`fused_all`): that product is then one
  for all of them, and so are its gradients;
- gates and their gradients are compiled code where that can be had (`kernel`); else they are stored with the tokens
  innermost: a gate's softmax goes over a handful of numbers, and along the tokens it is one vector operation for many
  of them (LOG.md, 2026-11-22: up to six times faster on a CPU);
- products in fp32 are computed by the processor's unit for bf16, where it has one (`tiles`);
- backward forms coefficients again from a few numbers per token: kept for it are x, h, and the scores or their gates;
- the sum is written over what the base layer gave, and the gradient for x over the base layer's, where `base` is given:
  of neither is there a second copy.

`fused` has the signature of `dyadic` and hands over to it where it cannot serve: inside `torch.compile` (which fuses
by itself) and torch.func, with adapter dropout (A and the router then see different inputs), and for gates that are
more than a choice among scores that are linear in x.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops import products
from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.kernel import Choice, Kernel, choice_of, kernel
from dyads.ops.products import autocast_dtype, cheap_dtype, join, linears, split
from dyads.ops.switch import FAST, PLAIN, Switch, unwatched
from dyads.ops.tiles import Right, times

__all__ = ["Adapted", "Splits", "can_share", "fused", "fused_all", "plain", "serves", "unshared"]

_SHARING = Switch()  # see `unshared`


class Splits(Gating, Protocol):
    """Gates chosen from scores that are linear in x: route(h, x, task) = select(h, W x, of_task(task))."""

    splits: bool
    """Whether the equation above holds."""

    def router_rows(self) -> Tensor | None:
        """W (s d); None where the gates do not look at x."""
        ...

    def of_task(self, task: Tensor | None) -> Tensor | None:
        """What the gates need from the tasks (b …), small; None where they look at none."""
        ...

    def select(self, h: Tensor, scores: Tensor | None, of_task: Tensor | None) -> Tensor:
        """Gates from h = A x (… p), scores W x (… s), and what the tasks gave."""
        ...

    keeps_gates: bool
    """Whether backward is given the gates in place of the scores, and asks `gradients`; else it asks autograd."""

    def gradients(self, h: Tensor, g: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of u = mix(h; select(h, scores)) for h (… p) and the scores (… s), from that for u (… q)."""
        ...

    def choice(self) -> Choice | None:
        """What select, mix and gradients do, where they are those of softmax gates that `Kernel` knows."""
        ...


def plain() -> AbstractContextManager[None]:
    """Within this context `fused` is `dyadic`: to compare the two, or to take gradients of gradients."""
    return FAST.off()


def unshared() -> AbstractContextManager[None]:
    """Within this context every layer is computed by itself."""
    return _SHARING.off()


def serves(gating: Gating) -> bool:
    """Whether gates of this kind need not be left to `dyadic`, here and now."""
    return (
        bool(FAST)
        and getattr(gating, "splits", False)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def can_share(x: Tensor) -> bool:
    """Whether layers with the input x may be computed at once, here and now: while gradients are recorded.

    Not where x comes from no operation: its layers then have no graph in common, and may be asked for their gradients
    one after the other, which one node would not survive. Not within autocast, and not where hooks see what is saved
    for backward, as in gradient checkpointing: it counts what is saved, and who shares with whom may be learned between
    its two passes.
    """
    return (
        bool(_SHARING)
        and torch.is_grad_enabled()
        and x.grad_fn is not None
        and not x.is_inference()
        and unwatched()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and autocast_dtype(x) is None
    )


class Adapted(NamedTuple):
    """A layer as `fused_all` takes it: the arguments of `fused` beside x."""

    A: Tensor
    B: Tensor
    gating: Splits
    task: Tensor | None
    scale: float
    base: Frozen | None


def fused_all(x: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """fused(x, …) of several layers, with one product down for all and one node of autograd.

    It serves where `serves(gating)` and `can_share(x)` hold. A layer whose result is not used costs no gradient.
    """
    return _fused(x, layers, None)


def fused(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gating: Gating,
    task: Tensor | None = None,
    *,
    scale: float = 1.0,
    onto: Tensor | None = None,
    base: Frozen | None = None,
    inner: Tensor | None = None,
) -> Tensor:
    """As `dyadic`, with the same shapes. Gradients of gradients are refused by PyTorch: take them inside `plain()`."""
    if inner is not None or not serves(gating):
        return dyadic(x, A, B, gating, task, scale=scale, onto=onto, base=base, inner=inner)
    gating = cast(Splits, gating)
    dtype = autocast_dtype(x)
    if dtype is not None:
        if base is not None:
            onto = F.linear(x, *base)  # as autocast does it
        with torch.autocast(x.device.type, enabled=False):
            return _one(x.to(dtype), Adapted(A, B, gating, task, scale, None), onto)
    return _one(x, Adapted(A, B, gating, task, scale, base), onto)


def _one(x: Tensor, layer: Adapted, onto: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return _fused(x, (layer,), onto)[0]
    A, B, gating, task, scale, base = layer
    joined = join((A, gating.router_rows()), cheap_dtype(x, max(A.shape[0], B.shape[0])))
    h, scores = split(products.down(x.to(joined.dtype), joined), A.shape[0])
    u = gating.mix(h, gating.select(h, scores, gating.of_task(task)))
    if base is not None:
        onto = next(linears(x, x.reshape(-1, x.shape[-1]), [base]))
    return products.up(u, B.to(joined.dtype), scale, x, onto, ours=base is not None)


class _Plan(NamedTuple):
    """What `_Fused` is told of a layer beside its tensors."""

    gating: Splits
    rows: int
    """p + s."""
    scale: float
    compiled: tuple[Kernel, Choice] | None
    """What computes its gates in one pass; None where PyTorch's operations serve."""


def _fused(x: Tensor, layers: Sequence[Adapted], onto: Tensor | None) -> tuple[Tensor, ...]:
    leaves: list[Tensor | None] = []
    plans, bases = [], []
    for A, B, gating, task, scale, base in layers:
        W = gating.router_rows()
        leaves += (A, W, B, gating.of_task(task))
        rows = A.shape[0] if W is None else A.shape[0] + W.shape[0]
        compiled = None if W is None else _compiled(x, A, W, B, gating)
        plans.append(_Plan(gating, rows, scale, compiled))
        bases.append(base)
    if len(plans) > 1 and not all(plan.compiled for plan in plans):
        plans = [plan._replace(compiled=None) for plan in plans]  # their product down lies one way round for all
    found: tuple[Tensor, ...] = _Fused.apply(x, onto, plans, bases, *leaves)  # type: ignore[no-untyped-call]
    return found


def _compiled(x: Tensor, A: Tensor, W: Tensor, B: Tensor, gating: Splits) -> tuple[Kernel, Choice] | None:
    if type(A) not in PLAIN or type(W) not in PLAIN:
        return None
    choice = choice_of(gating, A, W, B)
    found = kernel(x, choice)
    return None if found is None or choice is None else (found, choice)


class _Fused(torch.autograd.Function):
    """Keeps x, the weights, and for every layer h with the scores or gates; forms everything else again.

    Its leaves are four of every layer: A, W, B, and what the tasks gave.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, onto: Tensor | None, plans: list[_Plan], bases: list[Frozen | None], *leaves: Tensor | None
    ) -> tuple[Tensor, ...]:
        dtype, need_x = x.dtype, ctx.needs_input_grad[0]
        flat, joined = x.reshape(-1, x.shape[-1]), _joined(leaves, dtype)
        maps: list[Frozen] = [base for base in bases if base is not None]
        if plans[0].compiled is not None:
            linear = linears(x, flat, [(joined, None), *maps])
            z = next(linear).view(-1, joined.shape[0])
        else:
            linear, z = linears(x, flat, maps), products.down(flat, joined)
        # Casts are small beside x, and cost two passes over the weights. In the dtype of x there are none to keep.
        saved = [x, None if cast(Tensor, leaves[0]).dtype == dtype else joined]
        ys: list[Tensor] = []
        parts = z.split_with_sizes([plan.rows for plan in plans], 1) if len(plans) > 1 else (z,)
        for i, (plan, base, part) in enumerate(zip(plans, bases, parts, strict=True)):
            A, W, B, of_task = cast(Any, leaves[4 * i : 4 * i + 4])
            up, kept, gates = _cast(B, dtype), part, None
            if plan.compiled is not None:
                compiled, choice = plan.compiled
                u = compiled.mix(part, choice)
                gates = part.new_empty(0)  # they have taken the place of the scores; this tells a checkpoint so
            else:
                h, scores = split(part.view(*x.shape[:-1], plan.rows), A.shape[0])
                g = plan.gating.select(h, scores, of_task)
                u = plan.gating.mix(h, g)
                if scores is not None and plan.gating.keeps_gates and unwatched():
                    # Kept are h and the gates, not the scores: whichever of h and the gates is smaller is copied.
                    if h.shape[-1] < scores.shape[-1]:
                        kept, gates = h.clone(), g
                    else:
                        gates = scores.copy_(g.reshape(scores.shape)).view(g.shape)
            below = onto if base is None else next(linear)
            y = products.up(u, up, plan.scale, x, below, ours=base is not None)
            # As it is now, and only where it is needed: a layer may be merged before backward comes.
            weight = base[0].detach() if base is not None and need_x else None
            saved += (A, W, B, of_task, kept, gates, None if B.dtype == dtype else up, weight)
            # What a function gives as a view must not be changed in place, and models do that (`clamp_`).
            ys.append(torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y)
        ctx.save_for_backward(*saved)
        ctx.plans = plans
        ctx.set_materialize_grads(False)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint gives them once
        if autocast_dtype(saved[0]) is None:
            return _gradients(ctx, saved, dys)
        with torch.autocast(saved[0].device.type, enabled=False):  # it has nothing to say about what ran without it
            return _gradients(ctx, saved, dys)


def _gradients(ctx: Any, saved: Sequence[Any], dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, joined, *saved = saved
    need_x, need_onto, _, _, *needs = ctx.needs_input_grad
    flat, dtype = x.reshape(-1, x.shape[-1]), x.dtype
    grads: list[Tensor | None] = [None] * len(needs)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    rows = sum(ctx.plans[i].rows for i in used)
    dz, dx, at = flat.new_empty(rows, flat.shape[0]), None, 0  # tokens innermost
    for i in used:
        plan, (A, _, B, of_task, kept, gates, up, weight) = ctx.plans[i], saved[8 * i : 8 * i + 8]
        part, at = dz[at : at + plan.rows] if plan.rows < rows else dz, at + plan.rows
        dy = _cast(cast(Tensor, dys[i]), dtype).reshape(-1, B.shape[1])
        up = _cast(B, dtype) if up is None else up
        if plan.compiled is not None:
            compiled, choice = plan.compiled
            kept = kept if kept.stride(1) == 1 else kept.contiguous()  # hooks give what they like
            du, *more = times(dy, Right(up.t()), *([] if weight is None else [Right(weight, dx)]))
            dx = more[0] if more else dx
            u, _ = compiled.gradients(kept, du, choice, plan.scale, part)
        else:
            need_task, du = needs[4 * i + 3], up @ dy.t()
            u, d_task = _gradients_of_gates(plan, x, A.shape[0], kept, gates, of_task, need_task, du, part)
            grads[4 * i + 3] = d_task
            if weight is not None:
                (dx,) = times(dy, Right(weight, dx))
        if needs[4 * i + 2]:
            dB = _cast(times(u, Right(dy))[0], B.dtype)
            grads[4 * i + 2] = dB if plan.scale == 1.0 else dB.mul_(plan.scale)
    if used and need_x:
        if joined is None or len(used) < len(dys):
            joined = _joined([saved[8 * i + k] for i in used for k in range(4)], dtype)
        (dx,) = times(dz.t(), Right(joined, dx))
    if any(needs[0::4]) or any(needs[1::4]):
        (d_down,), at = times(dz, Right(flat)), 0
        for place, leaf in ((4 * i + k, saved[8 * i + k]) for i in used for k in (0, 1)):
            if leaf is not None:
                grads[place] = _cast(d_down[at : at + leaf.shape[0]], leaf.dtype) if needs[place] else None
                at += leaf.shape[0]
    return None if dx is None else dx.view(x.shape), dys[0] if need_onto else None, None, None, *grads


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without the call where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def _joined(leaves: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """A and W of all layers, one below the other."""
    return join([leaf for i, leaf in enumerate(leaves) if i % 4 < 2], dtype)


def _gradients_of_gates(
    plan: _Plan, x: Tensor, p: int, kept: Tensor, gates: Tensor | None, of_task: Tensor | None, need_task: bool,
    du: Tensor, dz: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """u (q tokens) again and the gradient of what the tasks gave; that of [h; scores] is written into dz."""
    if plan.scale != 1.0:
        du *= plan.scale
    q, shape = du.shape[0], x.shape[:-1]
    du = du.t().view(*shape, q)  # tokens innermost
    kept, d_task = kept.reshape(*shape, kept.shape[-1]), None
    if gates is not None:
        h = kept[..., :p]
        u = plan.gating.mix(h, gates)
        d_h, d_scores = plan.gating.gradients(h, gates, du)
    else:
        with torch.enable_grad():
            h, scores = split(kept, p)
            h = h.detach().requires_grad_()
            scores = None if scores is None else scores.detach().requires_grad_()
            if of_task is not None:
                of_task = of_task.detach().requires_grad_(need_task)
            u = plan.gating.mix(h, plan.gating.select(h, scores, of_task))
        inputs: list[Any] = [h, *([] if scores is None else [scores]), *([of_task] if need_task else [])]
        # A gate that does not depend on one of them has the gradient zero there, not none.
        grads = list(torch.autograd.grad(u, inputs, du, allow_unused=True, materialize_grads=True))
        d_task = grads.pop() if need_task else None
        d_h, d_scores = grads[0], grads[-1]
        u = u.detach()
    dz[:p] = d_h.reshape(-1, p).t()
    if plan.rows > p:
        dz[p:] = d_scores.reshape(-1, plan.rows - p).t()
    return u.reshape(-1, q).t(), d_task
