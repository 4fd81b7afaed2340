"""How is an adapted linear layer computed in one pass?

    y = x Wᵀ + c + s x̃ AᵀBᵀ,   x̃ = dropout(x)

PEFT computes base and adapter one after the other and adds them up: three more passes over an output-sized tensor in
each direction, and autograd keeps x̃ and the dropout's noise. Here it is one autograd node: both products go into the
same buffer, of the noise one bit-like mask is kept, and x̃ is made again. Layers that take the same x (queries, keys and
values) can share a node: their gradients of x are summed up as they arise. An x that is a product of two tensors that
autograd keeps in any case (a gated MLP's) can be multiplied again and need not be kept.

It stands in for PEFT's forward where that is plain LoRA on a linear layer, in any precision; a quantised base keeps its
own product. Values differ from PEFT's by the rounding of sums in another order, and on a CPU by which entries a dropout
leaves.

Source: LoRA (arXiv 2106.09685), equation 3; gradients by the chain rule.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def fusible(module: nn.Module) -> bool:
    """Whether a PEFT LoRA layer is one whose forward pass can be fused: plain LoRA of one adapter on a linear layer.

    A piece that somebody watches by a hook has to be called: ZeRO-3 gathers parameters so.
    """
    adapters = getattr(module, "active_adapters", ())
    # Asked of every layer before every step, so past the slow lookup of submodules.
    own = module._modules
    if len(adapters) != 1 or adapters[0] not in (layers_a := own.get("lora_A") or {}):
        return False
    name = adapters[0]
    if module.lora_variant.get(name) is not None or getattr(module, "fan_in_fan_out", False):
        return False
    pieces = own["base_layer"], layers_a[name], own["lora_B"][name], own["lora_dropout"][name]
    base, a, b, dropout = pieces
    return (
        type(base) in _bases()
        and type(a) is type(b) is nn.Linear
        and a.bias is b.bias is None
        and type(dropout) in (nn.Identity, nn.Dropout)
        and not any(p is not None and p.requires_grad for p in base._parameters.values())
        and not any(piece._forward_hooks or piece._forward_pre_hooks for piece in pieces)
    )


_multiply_again = False


@contextmanager
def products_made_again(wanted: bool = True) -> Iterator[None]:
    """Within it no input is kept that is a product of two kept tensors; it is the same to the bit when made again.

    Args:
        wanted: False: nothing changes. So under activation checkpointing, where a tensor can be asked for only once.
    """
    global _multiply_again
    before, _multiply_again = _multiply_again, wanted
    try:
        yield
    finally:
        _multiply_again = before


def _made_by(x: Tensor) -> Any:
    """The autograd node that x is the product of, if it keeps both of its factors; else None."""
    if not _multiply_again or torch.compiler.is_compiling():
        return None
    node = x.grad_fn
    # As in `a * b`. Of a factor that needs no gradient the node does not keep the other one.
    if type(node).__name__ != "MulBackward0" or node._saved_self is None or node._saved_other is None:
        return None
    return node


def _again(node: Any) -> Tensor:
    """x `(n, in)` from the node that made it, whose own backward pass, which frees the factors, comes later."""
    return _rows(node._saved_self * node._saved_other)


def fused_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a `fusible` layer's own forward gives, up to rounding.

    Args:
        module: the layer, its adapter neither disabled nor merged.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    together = fused_together([module], x)
    if together is not None:
        return together[0]
    low = _Adapter.of(module)
    dtype = _autocast(x) or low.a.dtype
    return _Update.apply(module.base_layer(x), x, _made_by(x), low.a, low.b, low.scaling, low.rate, dtype)


def fused_together(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """What `fusible` layers give for an input that all of them take, as one node.

    The gradient of x is summed up in one buffer, and without a dropout the factors A are one matrix.

    Args:
        modules: the layers, their adapters neither disabled nor merged.
        x: `(..., in)`.

    Returns:
        `(..., out)` of each; None: they are quantised, or their factors A cannot stand in one matrix.
    """
    bases, adapters = [module.base_layer for module in modules], [_Adapter.of(module) for module in modules]
    kinds = {(type(base), low.a.dtype, low.a.device, low.a.shape[1]) for base, low in zip(bases, adapters, strict=True)}
    if len(kinds) > 1 or type(bases[0]) is not nn.Linear:
        return None
    parts = [(base.weight, base.bias, low.a, low.b) for base, low in zip(bases, adapters, strict=True)]
    numbers = [(low.scaling, low.rate) for low in adapters]
    autocast = _autocast(x)
    low = autocast or adapters[0].a.dtype
    return _Fused.apply(x, _made_by(x), numbers, autocast or x.dtype, low, *itertools.chain.from_iterable(parts))


class _Adapter(NamedTuple):
    """The low-rank part of a layer."""

    a: Tensor
    """`(r, in)`."""
    b: Tensor
    """`(out, r)`."""
    scaling: float
    rate: float
    """Of the dropout, as it is now."""

    @classmethod
    def of(cls, module: nn.Module) -> _Adapter:
        name = module.active_adapters[0]
        dropout = module.lora_dropout[name]
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return cls(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name], rate)


class _Fused(Function):
    """Layers with one input; base products in `dtype`, the low-rank ones in `low`.

    `product` is the node that made x, if x is to be made again; `numbers` are scaling and dropout rate of each layer,
    `parts` weight, bias, A and B, one layer after another.
    """

    @staticmethod
    def forward(ctx: Any, x, product, numbers, dtype, low, *parts) -> tuple[Tensor, ...]:
        rows, layers = _rows(x).to(dtype), [parts[i : i + 4] for i in range(0, len(parts), 4)]
        outputs = [F.linear(rows, w.to(dtype), None if c is None else c.to(dtype)) for w, c, _, _ in layers]
        adapters = [_Adapter(a, b, *own) for (_, _, a, b), own in zip(layers, numbers, strict=True)]
        hidden, masks = _add_low_rank(outputs, rows, adapters, low)
        # The weights as they are: cast copies of them would be held until the backward pass.
        kept = [tensor for weight, _, a, b in layers for tensor in (weight, a, b)]
        ctx.save_for_backward(rows if product is None else None, *hidden, *masks, *kept)
        ctx.product, ctx.numbers, ctx.dtype, ctx.low, ctx.x_dtype = product, numbers, dtype, low, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        count, (rows, *saved) = len(grads), ctx.saved_tensors
        if ctx.product is not None:
            rows = _again(ctx.product).to(ctx.dtype)
        hidden, masks, kept = saved[:count], saved[count : 2 * count], saved[2 * count :]
        # An output that the loss does not depend on has no gradient, and its layer none.
        used = [i for i, grad in enumerate(grads) if grad is not None]
        outer = [_rows(grads[i]) for i in used]
        adapters = [_Adapter(kept[3 * i + 1], kept[3 * i + 2], *ctx.numbers[i]) for i in used]
        of_x = None
        if ctx.needs_input_grad[0]:
            for i, grad in zip(used, outer, strict=True):
                weight = kept[3 * i].to(grad.dtype)
                of_x = _plus_product(of_x, grad, weight)
        factors = [hidden[i] for i in used], [masks[i] for i in used]
        of_x, of_factors = _low_rank_gradients(outer, of_x, rows, adapters, *factors, ctx.needs_input_grad[0], ctx.low)
        found: list = [None] * (4 * count)
        for i, (of_a, of_b) in zip(used, of_factors, strict=True):
            found[4 * i + 2 : 4 * i + 4] = of_a, of_b
        return _like(of_x, grads[used[0]], ctx.x_dtype), None, None, None, None, *found


class _Update(Function):
    """The adapter's part on top of what a quantised base has computed."""

    @staticmethod
    def forward(ctx: Any, y, x, product, a, b, scaling: float, rate: float, low) -> Tensor:
        # A copy, as PEFT takes one: a gradient through an output of bitsandbytes that was changed in place may fail.
        whole, rows = _rows(y).clone(), _rows(x)
        (hidden,), (mask,) = _add_low_rank([whole], rows, [_Adapter(a, b, scaling, rate)], low)
        ctx.save_for_backward(rows if product is None else None, hidden, mask, a, b)
        ctx.product, ctx.numbers, ctx.low, ctx.x_dtype = product, (scaling, rate), low, x.dtype
        return whole.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, hidden, mask, a, b = ctx.saved_tensors
        if ctx.product is not None:
            rows = _again(ctx.product)
        layer = [_Adapter(a, b, *ctx.numbers)]
        of_x, ((of_a, of_b),) = _low_rank_gradients(
            [_rows(grad)], None, rows, layer, [hidden], [mask], ctx.needs_input_grad[1], ctx.low
        )
        return grad, _like(of_x, grad, ctx.x_dtype), None, of_a, of_b, None, None, None


def _add_low_rank(outputs: list[Tensor], rows: Tensor, layers: list[_Adapter], low: torch.dtype) -> tuple[list, list]:
    """Add `s x̃ AᵀBᵀ` to each layer's output, in place where the types allow it.

    Args:
        outputs: y of each layer, `(n, out)`.
        rows: x, `(n, in)`.
        layers: their adapters.
        low: type of the products.

    Returns:
        What the gradients need of each layer: `x̃ Aᵀ (n, r)`, and which entries a dropout has left, or None.
    """
    values = rows.to(low)
    masks = [_drawn(values, layer.rate) if layer.rate > 0 else None for layer in layers]
    if _together(masks):
        hidden = list((values @ _stacked(layers, low).t()).split([len(layer.a) for layer in layers], 1))
    else:
        hidden = [_kept(values, mask) @ layer.a.to(low).t() for layer, mask in zip(layers, masks, strict=True)]
    for y, inner, layer in zip(outputs, hidden, layers, strict=True):
        b, scaling = layer.b.to(low).t(), layer.scaling / (1.0 - layer.rate)
        if y.dtype == low:
            y.addmm_(inner, b, alpha=scaling)
        else:
            # Added in the wider of the two types, and rounded once.
            y.add_(inner @ b, alpha=scaling)
    return hidden, masks


def _low_rank_gradients(
    grads: list[Tensor], base: Tensor | None, rows: Tensor, layers: list[_Adapter], hidden: list[Tensor],
    masks: list[Tensor | None], asked: bool, low: torch.dtype,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Gradients of x and of each layer's factors.

    Args:
        grads: of each layer's output, `(n, out)`.
        base: gradient of x through the base products, `(n, in)`, which is added to; None: there is none.
        rows, layers, low: of `_add_low_rank`.
        hidden, masks: what that returned.
        asked: whether x needs one.
    """
    grads = [grad.to(low) for grad in grads]
    of_hidden, of_b = [], []
    for grad, layer, own in zip(grads, layers, hidden, strict=True):
        scaling = layer.scaling / (1.0 - layer.rate)
        of_hidden.append((grad @ layer.b.to(low)).mul_(scaling))  # (n, r)
        # With the long side last, which BLAS does in a third of the time.
        of_b.append((own.t() @ grad).mul_(scaling).t().to(layer.b.dtype))
    values, of_x = rows.to(low), base
    if _together(masks):
        every = of_hidden[0] if len(of_hidden) == 1 else torch.cat(of_hidden, 1)
        of_a = (every.t() @ values).split([len(layer.a) for layer in layers])
        if asked:
            of_x = _plus_product(base, every, _stacked(layers, low))
    else:
        of_a = [own.t() @ _kept(values, mask) for own, mask in zip(of_hidden, masks, strict=True)]
        for own, layer, mask in zip(of_hidden, layers, masks, strict=True):
            if asked:
                through = _kept(own @ layer.a.to(low), mask)
                of_x = through if of_x is None else of_x.add_(through)
    return of_x, [(a.to(layer.a.dtype), b) for a, b, layer in zip(of_a, of_b, layers, strict=True)]


def _together(masks: list[Tensor | None]) -> bool:
    """Whether no dropout gives the layers inputs of their own."""
    return all(mask is None for mask in masks)


def _stacked(layers: list[_Adapter], low: torch.dtype) -> Tensor:
    """The factors A below each other."""
    return layers[0].a.to(low) if len(layers) == 1 else torch.cat([layer.a for layer in layers]).to(low)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """`total + left right`, in place."""
    if total is None:
        return left @ right
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)


def _drawn(values: Tensor, rate: float) -> Tensor:
    """Which entries a dropout leaves.

    On a GPU by the random numbers of torch's own dropout. On a CPU those take longer than the products they are for:
    there four entries share one number, of whose 65536 values each a share of `1 - rate` (to the nearest) leaves it.
    """
    if values.device.type != "cpu":
        return torch.native_dropout(values, rate, True)[1]
    count, half = values.numel(), 2**63
    if torch.compiler.is_compiling():
        # The same words out of place, which alone can be traced: torch draws them less half their range, and all but
        # the last of them.
        words = torch.randint(-half, half - 1, ((count + 3) // 4,), dtype=torch.int64) ^ -half
    else:
        words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-half, None)
    return (words.view(torch.int16)[:count] < round((1.0 - rate) * 2**16) - 2**15).view(values.shape)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` where the mask is, 0 elsewhere."""
    return values if mask is None else mask.to(values.dtype).mul_(values)


def _rows(values: Tensor) -> Tensor:
    """`(..., d)` as `(n, d)`."""
    return values.reshape(-1, values.shape[-1])


def _autocast(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _like(rows: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if rows is None else rows.view(*grad.shape[:-1], -1).to(dtype)


@functools.cache
def _bases() -> tuple[type, ...]:
    """Linear layers, and those of bitsandbytes, if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return (nn.Linear,)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return nn.Linear, Linear4bit, Linear8bitLt
