# SPDX-License-Identifier: Apache-2.0
"""How is the same operator computed with less traffic?

Five things differ from `dyadic`, and none of them changes the result beyond rounding:

- A and the router see the same input, so [A; W] x is one product;
- gates and their gradients are compiled code where that can be had (`kernel`); else they are stored with the tokens
  innermost: a gate's softmax goes over a handful of numbers, and along the tokens it is one vector operation for many
  of them (LOG.md, 2026-11-22: up to six times faster on a CPU);
- backward forms coefficients again from a few numbers per token: kept for it are x, h, and the scores or their gates;
- the sum is written over what the base layer gave, and the gradient for x over the base layer's, where `base` is given:
  of neither is there a second copy.

`fused` has the signature of `dyadic` and hands over to it where it cannot serve: inside `torch.compile` (which fuses
by itself) and torch.func, with adapter dropout (A and the router then see different inputs), and for gates that are
more than a choice among scores that are linear in x.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dyads.ops.dyadic import Frozen, Gating, dyadic
from dyads.ops.kernel import Choice, Kernel, kernel
from dyads.ops.switch import Switch

__all__ = ["Held", "Splits", "Together", "autocast_dtype", "fused", "plain"]

_ENABLED = Switch()  # see `plain`

# Decoding is made of products with few rows. On a CPU, half precision costs about 40 µs before it starts; in that time
# fp32 does about this many multiplications (LOG.md, 2026-11-22).
_SMALL_PRODUCT = 2**21
_HALF = (torch.bfloat16, torch.float16)


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
    return _ENABLED.off()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to products with x; None where it leaves them alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def _is_small(x: Tensor, rows: int) -> bool:
    return x.numel() * rows <= _SMALL_PRODUCT


def _down(A: Tensor, W: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (A if W is None else torch.cat((A, W))).to(dtype)


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
    if (
        torch.compiler.is_compiling()
        or not _ENABLED
        or inner is not None
        or not getattr(gating, "splits", False)
        or torch._C._are_functorch_transforms_active()
    ):
        return dyadic(x, A, B, gating, task, scale=scale, onto=onto, base=base, inner=inner)
    gating = cast(Splits, gating)
    dtype = autocast_dtype(x)
    if dtype is None:
        return _fused(x, A, B, gating, task, scale, onto, base)
    if base is not None:
        onto = F.linear(x, *base)  # as autocast does it
    with torch.autocast(x.device.type, enabled=False):
        return _fused(x.to(dtype), A, B, gating, task, scale, onto, None)


def _fused(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gating: Splits,
    task: Tensor | None,
    scale: float,
    onto: Tensor | None,
    base: Frozen | None,
) -> Tensor:
    of_task = gating.of_task(task)
    if torch.is_grad_enabled():
        W, (weight, bias) = gating.router_rows(), base or (None, None)
        return cast(Tensor, _Fused.apply(x, A, W, B, of_task, onto, weight, bias, gating, scale))  # type: ignore[no-untyped-call]
    down, up = _down(A, gating.router_rows(), _cheap_dtype(x, max(A.shape[0], B.shape[0]))), B
    h, scores = _split(_product(x.to(down.dtype), down), A.shape[0])
    u = gating.mix(h, gating.select(h, scores, of_task))
    onto, in_place = _beneath(x, onto, base)
    return _up(u, up.to(down.dtype), scale, onto, x.dtype, in_place)


def _cheap_dtype(x: Tensor, rows: int) -> torch.dtype:
    """The dtype of products without gradients: that of x, but fp32 for a few rows in half precision on a CPU."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in _HALF and _is_small(x, rows) else x.dtype


class Held:
    """The operator for weights that stay as they are and ask for no gradients: joined and cast once for many calls.

    Decoding consists of such calls, of few rows each, in which every operation counts. `held(x, task, base=…)` is
    `fused(x, A, B, gating, task, scale=…, base=…)`; it serves while gradients and autocast are off, and it is on its
    user to drop it when the weights change. On a CPU, what the gates need from a task is computed once too.
    """

    __slots__ = ("A", "B", "_made", "_of_tasks", "_rows", "_splits", "core", "scale")

    def __init__(self, A: Tensor, B: Tensor, gating: Gating, scale: float) -> None:
        self.A, self.B, self.core, self.scale = A, B, cast(Any, gating), scale
        self._splits = getattr(gating, "splits", False)
        self._rows = max(A.shape[0], B.shape[0])
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
        self._of_tasks: dict[int, Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        task: Tensor | None = None,
        *,
        onto: Tensor | None = None,
        base: Frozen | None = None,
        together: Together | None = None,
    ) -> Tensor:
        """`together` serves layers that see the same x one after the other."""
        if not _ENABLED or not self._splits:
            return dyadic(x, self.A, self.B, self.core, task, scale=self.scale, onto=onto, base=base)
        dtype = _cheap_dtype(x, self._rows)
        down, up = self.weights(dtype)
        if together is not None and task is None and _is_small(x, self._rows):
            u = together.coefficients(self, x, dtype)
        else:
            u = self.coefficients(x, down, self.of_task(task))
        onto, in_place = _beneath(x, onto, base)
        y = _up(u, up, 1.0, onto, x.dtype, in_place)
        return y.view(*x.shape[:-1], y.shape[-1]) if onto is None else y

    def coefficients(self, x: Tensor, down: Tensor, of_task: Tensor | None = None, layers: int = 1) -> Tensor:
        """What the rows of B are multiplied by: (… q), or (… layers q) with the weights of several layers in `down`."""
        rows = x.reshape(-1, x.shape[-1]).to(down.dtype)
        # As in `_product`: the tokens innermost where they are many.
        z = torch.mm(rows, down) if _is_small(x, self._rows) else torch.mm(down.t(), rows.t()).t()
        if of_task is not None:
            z = z.view(*x.shape[:-1], z.shape[-1])  # gates that look at no task see rows, whatever a sample is
        if layers > 1:
            z = z.view(*z.shape[:-1], layers, z.shape[-1] // layers)
        h, scores = _split(z, self.A.shape[0])
        u: Tensor = self.core.mix(h, self.core.select(h, scores, of_task))
        return u

    def of_task(self, task: Tensor | None) -> Tensor | None:
        """core.of_task(task); for a task that was seen before, what it was then."""
        if task is None or task.device.type != "cpu":  # an accelerator would have to wait for the ids
            return cast("Tensor | None", self.core.of_task(task))
        ids: list[int] = task.tolist()
        for one in set(ids) - self._of_tasks.keys():
            # Every task by itself: its row must not depend, not even by rounding, on which others there are.
            row = self.core.of_task(task.new_tensor([one]))
            if row is None:
                return None
            self._of_tasks[one] = row
        first = self._of_tasks[ids[0]]
        if ids.count(ids[0]) == len(ids):
            return first.expand(len(ids), *first.shape[1:])
        return torch.cat([self._of_tasks[one] for one in ids])

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[A; W]ᵀ and scale · B."""
        made = self._made.get(dtype)
        if made is None:
            down = _down(self.A, self.core.router_rows(), dtype).t().contiguous()
            up = (self.B * self.scale).to(dtype) if self.scale != 1.0 else self.B.to(dtype)
            made = self._made[dtype] = (down, up)
        return made

    def is_like(self, other: Held) -> bool:
        """Whether one call of `select` and `mix` can serve both: cores that differ in nothing but their weights."""
        ours, theirs = (one.core.router_rows() for one in (self, other))
        alike = type(self.core) is type(other.core) and self.A.shape == other.A.shape
        alike = alike and len(self.B) == len(other.B) and (ours is None) == (theirs is None)
        alike = alike and (ours is None or ours.shape == theirs.shape) and _plain(self.core) == _plain(other.core)
        return alike and not any(True for core in (self.core, other.core) for _ in core.buffers())


def _plain(core: Any) -> dict[str, Any]:
    """What a core is made with: its attributes that are neither PyTorch's nor weights."""
    return {key: value for key, value in vars(core).items() if not key.startswith("_")}


class Together:
    """Layers of one adapter that see the same input, such as q, k and v: their products down are one, and their gates.

    Which layers these are is seen as they are called: one after the other with the very same tensor. From the next
    forward pass on the first of them computes for all, and the others find what is theirs. A layer that is called with
    another tensor, or one that was changed since, computes by itself (within `torch.inference_mode`, where tensors do
    not count their changes, it must not be changed in between).
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._version = 0
        self._first: Held | None = None
        self._found: dict[int, Tensor] = {}
        self._siblings: dict[int, list[Held]] = {}
        self._made: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def coefficients(self, held: Held, x: Tensor, dtype: torch.dtype) -> Tensor:
        """As `Held.coefficients`, for an operator whose gates look at no task."""
        version = 0 if x.is_inference() else x._version
        if x is self._x and version == self._version:
            found = self._found.pop(id(held), None)
            if found is not None:
                return found
            first = self._first
            if first is not None and first is not held and held.is_like(first):
                siblings = self._siblings.setdefault(id(first), [])
                if held not in siblings:
                    siblings.append(held)
            return held.coefficients(x, held.weights(dtype)[0])
        self._x, self._version, self._first, self._found = x, version, held, {}
        siblings = self._siblings.get(id(held), [])
        if not siblings:
            return held.coefficients(x, held.weights(dtype)[0])
        key = (id(held), len(siblings), dtype)
        down = self._made.get(key)
        if down is None:
            down = self._made[key] = torch.cat([one.weights(dtype)[0] for one in (held, *siblings)], 1)
        u = held.coefficients(x, down, layers=1 + len(siblings))
        mine, *others = u.unbind(-2)
        self._found = {id(one): theirs for one, theirs in zip(siblings, others, strict=True)}
        return mine


def _unwatched() -> bool:
    """Whether nobody looks on who may keep what an operation gave, as selective checkpointing does."""
    return torch._C._len_torch_dispatch_stack() == 0


def _beneath(x: Tensor, onto: Tensor | None, base: Frozen | None) -> tuple[Tensor | None, bool]:
    """What the sum is added to, and whether it may be written over."""
    return (onto, False) if base is None else (F.linear(x, *base), _unwatched())


def _product(x: Tensor, down: Tensor) -> Tensor:
    """[A; W] x (… p + s), a view of a matrix that has the tokens innermost where they are many."""
    if _is_small(x, down.shape[0]):
        return F.linear(x, down)
    tokens: Tensor = (down @ x.reshape(-1, x.shape[-1]).t()).t()
    return tokens.view(*x.shape[:-1], down.shape[0])


def _kernel_for(gating: Splits, down: Tensor, up: Tensor) -> tuple[Kernel, Choice] | None:
    """What computes gates in one pass, and what it must know of them; None where PyTorch's operations serve."""
    choice = gating.choice() if gating.keeps_gates and _unwatched() else None
    if choice is None or len(down) != choice.p + choice.s or len(up) != choice.q:
        return None
    found = kernel(down, choice)
    return None if found is None else (found, choice)


def _split(z: Tensor, p: int) -> tuple[Tensor, Tensor | None]:
    """h and the scores, from z = [A; W] x (… p + s)."""
    if z.shape[-1] == p:
        return z, None
    h, scores = z.split_with_sizes((p, z.shape[-1] - p), -1)
    return h, scores


def _up(u: Tensor, up: Tensor, scale: float, onto: Tensor | None, dtype: torch.dtype, in_place: bool) -> Tensor:
    q, o = up.shape
    if onto is None:
        return ((u if scale == 1.0 else u * scale) @ up).to(dtype)
    if onto.dtype == up.dtype:
        # One product both projects up and adds: the sum needs no memory of its own.
        if in_place:
            onto.view(-1, o).addmm_(u.reshape(-1, q), up, alpha=scale)
            return onto
        return torch.addmm(onto.reshape(-1, o), u.reshape(-1, q), up, alpha=scale).view(onto.shape)
    delta = torch.mm(u.reshape(-1, q), up).view(onto.shape)
    return onto.add_(delta, alpha=scale) if in_place else torch.add(onto, delta, alpha=scale).to(onto.dtype)


class _Fused(torch.autograd.Function):
    """Keeps x, h with the scores or gates, and the weights; forms everything else again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, W: Tensor | None, B: Tensor, of_task: Tensor | None,
                onto: Tensor | None, weight: Tensor | None, bias: Tensor | None,
                gating: Splits, scale: float) -> Tensor:  # fmt: skip
        down, up = _down(A, W, x.dtype), B.to(x.dtype)
        ctx.kernel = None if W is None else _kernel_for(gating, down, up)
        gates = None
        if ctx.kernel is not None:
            compiled, choice = ctx.kernel
            kept = F.linear(x.reshape(-1, x.shape[-1]), down)
            u = compiled.mix(kept, choice).view(*x.shape[:-1], choice.q)
            gates = kept[:, choice.p :]  # they have taken the place of the scores
        else:
            kept = _product(x, down)
            h, scores = _split(kept, A.shape[0])
            g = gating.select(h, scores, of_task)
            u = gating.mix(h, g)
            if scores is not None and gating.keeps_gates and _unwatched():
                # Kept are h and the gates, not the scores: whichever of h and the gates is smaller is copied.
                if h.shape[-1] < scores.shape[-1]:
                    kept, gates = h.clone(), g
                else:
                    gates = scores.copy_(g.reshape(scores.shape)).view(g.shape)
        onto, in_place = _beneath(x, onto, None if weight is None else (weight, bias))
        y = _up(u, up, scale, onto, x.dtype, in_place)
        # Casts are small beside x, and cost two passes over the weights. In the dtype of x there are none to keep.
        casts = (None, None) if A.dtype == x.dtype else (down, up)
        # As it is now, and only where it is needed: a layer may be merged before backward comes.
        frozen = weight.detach() if weight is not None and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(x, kept, gates, A, W, B, of_task, frozen, *casts)
        ctx.gating, ctx.scale = gating, scale
        # What a function gives as a view must not be changed in place, and models do that (`clamp_`).
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if autocast_dtype(dy) is None:
            return _gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # it has nothing to say about what ran without it
            return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, kept, gates, A, W, B, of_task, weight, down, up = ctx.saved_tensors
    need_x, need_A, need_W, need_B, _, need_onto = ctx.needs_input_grad[:6]
    p, o, dtype = A.shape[0], B.shape[1], x.dtype
    s = 0 if W is None else W.shape[0]
    flat = dy.to(dtype).reshape(-1, o)
    up = B.to(dtype) if up is None else up
    d_task = None
    if ctx.kernel is not None:
        compiled, choice = ctx.kernel
        u, dz = compiled.gradients(kept.contiguous(), flat @ up.t(), choice, ctx.scale)
    else:
        u, dz, d_task = _gradients_of_gates(ctx, kept, gates, of_task, up @ flat.t(), p, s)
    dx = dA = dW = dB = None
    if need_B:
        dB = (u @ flat).to(B.dtype)
        if ctx.scale != 1.0:
            dB *= ctx.scale
    if need_A or need_W:
        d_down = dz @ x.reshape(-1, x.shape[-1])
        dA = d_down[:p].to(A.dtype) if need_A else None
        dW = d_down[p:].to(W.dtype) if need_W else None
    if need_x:
        down = _down(A, W, dtype) if down is None else down
        dx = dz.t() @ down if weight is None else (flat @ weight).addmm_(dz.t(), down)
        dx = dx.view(x.shape)
    return dx, dA, dW, dB, d_task, dy if need_onto else None, None, None, None, None


def _gradients_of_gates(
    ctx: Any, kept: Tensor, gates: Tensor | None, of_task: Tensor | None, du: Tensor, p: int, s: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u (q tokens) again, the gradient of [h; scores] (p + s tokens), and that of what the tasks gave."""
    if ctx.scale != 1.0:
        du *= ctx.scale
    q, tokens = du.shape
    du = du.t().view(*kept.shape[:-1], q)  # tokens innermost
    dz, d_task = du.new_empty(p + s, tokens), None
    if gates is not None:
        h = kept[..., :p]
        u = ctx.gating.mix(h, gates)
        d_h, d_scores = ctx.gating.gradients(h, gates, du)
    else:
        need_task = ctx.needs_input_grad[4]
        with torch.enable_grad():
            h, scores = _split(kept, p)
            h = h.detach().requires_grad_()
            scores = None if scores is None else scores.detach().requires_grad_()
            if of_task is not None:
                of_task = of_task.detach().requires_grad_(need_task)
            u = ctx.gating.mix(h, ctx.gating.select(h, scores, of_task))
        inputs: list[Any] = [h, *([] if scores is None else [scores]), *([of_task] if need_task else [])]
        # A gate that does not depend on one of them has the gradient zero there, not none.
        grads = list(torch.autograd.grad(u, inputs, du, allow_unused=True, materialize_grads=True))
        d_task = grads.pop() if need_task else None
        d_h, d_scores = grads[0], grads[-1]
        u = u.detach()
    dz[:p] = d_h.reshape(-1, p).t()
    if s:
        dz[p:] = d_scores.reshape(-1, s).t()
    return u.reshape(-1, q).t(), dz, d_task
