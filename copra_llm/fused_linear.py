"""How is an adapted linear layer computed in one pass?

    y = x Wᵀ + c + s x̃ AᵀBᵀ,   x̃ = dropout(x)

PEFT computes base and adapter one after the other and adds them up: three more passes over an output-sized tensor in
each direction, and autograd keeps x̃ and the dropout's noise. Here it is one autograd node: both products go into the
same buffer, of the noise one bit-like mask is kept, and x̃ is made again. The products of rank r are taken with the
long side last, which BLAS does in half the time.

It stands in for PEFT's forward where that is plain LoRA on a linear layer, in any precision; a quantised base keeps its
own product. Values differ from PEFT's by the rounding of sums in another order, and on a CPU by which entries a dropout
leaves.

Source: LoRA (arXiv 2106.09685), equation 3; gradients by the chain rule.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

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
    if len(adapters) != 1 or adapters[0] not in getattr(module, "lora_A", {}):
        return False
    name = adapters[0]
    if module.lora_variant.get(name) is not None or getattr(module, "fan_in_fan_out", False):
        return False
    pieces = (module.base_layer, module.lora_A[name], module.lora_B[name], module.lora_dropout[name])
    base, a, b, dropout = pieces
    return (
        type(base) in (nn.Linear, *_quantised())
        and type(a) is type(b) is nn.Linear
        and a.bias is b.bias is None
        and type(dropout) in (nn.Identity, nn.Dropout)
        and not any(p.requires_grad for p in base.parameters())
        and not any(piece._forward_hooks or piece._forward_pre_hooks for piece in pieces)
    )


def fused_forward(module: nn.Module, x: Tensor) -> Tensor:
    """What a `fusible` layer's own forward gives, up to rounding.

    Args:
        module: the layer, its adapter neither disabled nor merged.
        x: `(..., in)`.

    Returns:
        `(..., out)`.
    """
    name = module.active_adapters[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    dropout, base = module.lora_dropout[name], module.base_layer
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
    low = autocast or a.dtype
    if type(base) is nn.Linear:
        return _Fused.apply(x, base.weight, base.bias, a, b, module.scaling[name], rate, autocast or x.dtype, low)
    return _Update.apply(base(x), x, a, b, module.scaling[name], rate, low)


class _Fused(Function):
    """Base and adapter as one node; the base product in `dtype`, the low-rank ones in `low`."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, a, b, scaling: float, rate: float, dtype, low) -> Tensor:
        rows = _rows(x).to(dtype)
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))
        y, kept = _add_low_rank(y, rows, a, b, scaling, rate, low)
        # The weight as it is: a cast copy of it would be held until the backward pass.
        ctx.save_for_backward(weight, a, b, *kept)
        ctx.scaling, ctx.rate, ctx.low, ctx.x_dtype = scaling, rate, low, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        weight, a, b, *kept = ctx.saved_tensors
        rows, asked = _rows(grad), (ctx.needs_input_grad[i] for i in (0, 3, 4))
        base = rows @ weight.to(rows.dtype) if ctx.needs_input_grad[0] else None
        of_x, of_a, of_b = _low_rank_gradients(rows, base, asked, a, b, kept, ctx.scaling, ctx.rate, ctx.low)
        return _like(of_x, grad, ctx.x_dtype), None, None, of_a, of_b, None, None, None, None


class _Update(Function):
    """The adapter's part on top of what a quantised base has computed."""

    @staticmethod
    def forward(ctx: Any, y, x, a, b, scaling: float, rate: float, low) -> Tensor:
        # A copy, as PEFT takes one: a gradient through an output of bitsandbytes that was changed in place may fail.
        whole, kept = _add_low_rank(_rows(y).clone(), _rows(x), a, b, scaling, rate, low)
        ctx.save_for_backward(a, b, *kept)
        ctx.scaling, ctx.rate, ctx.low, ctx.x_dtype = scaling, rate, low, x.dtype
        return whole.view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        a, b, *kept = ctx.saved_tensors
        rows, asked = _rows(grad), ctx.needs_input_grad[1:4]
        of_x, of_a, of_b = _low_rank_gradients(rows, None, asked, a, b, kept, ctx.scaling, ctx.rate, ctx.low)
        return grad, _like(of_x, grad, ctx.x_dtype), of_a, of_b, None, None, None


def _add_low_rank(y, rows, a, b, scaling, rate, low) -> tuple[Tensor, tuple]:
    """`y + s x̃ AᵀBᵀ`, in place where the types allow it, and what its gradients need.

    Args:
        y: `(n, out)`.
        rows: x, `(n, in)`.
        a: `(r, in)`.
        b: `(out, r)`.
    """
    values, mask = rows.to(low), None
    if rate > 0:
        mask = _drawn(values, rate)
        values = _kept(values, mask)
    hidden = a.to(low) @ values.t()  # (r, n)
    b, scaling = b.t().to(low), scaling / (1.0 - rate)
    if y.dtype == low:
        y.addmm_(hidden.t(), b, alpha=scaling)
    else:
        # Added in the wider of the two types, and rounded once.
        y.add_(hidden.t() @ b, alpha=scaling)
    return y, (rows, hidden, mask)


def _low_rank_gradients(grad, base, asked, a, b, kept, scaling, rate, low) -> tuple:
    """Gradients of x (that of the base product, `base`, included), A and B, of those that are asked for."""
    rows, hidden, mask = kept
    asked_x, asked_a, asked_b = asked
    grad, scaling = grad.to(low), scaling / (1.0 - rate)
    of_hidden = (b.t().to(low) @ grad.t()).mul_(scaling)  # (r, n)
    of_a = of_b = of_x = None
    if asked_a:
        of_a = (of_hidden @ _kept(rows.to(low), mask)).to(a.dtype)
    if asked_b:
        of_b = (hidden @ grad).mul_(scaling).t().to(b.dtype)
    if asked_x and mask is None and base is not None and base.dtype == low:
        of_x = base.addmm_(of_hidden.t(), a.to(low))
    elif asked_x:
        of_x = _kept(of_hidden.t() @ a.to(low), mask)
        of_x = of_x if base is None else base.add_(of_x)
    return of_x, of_a, of_b


def _drawn(values: Tensor, rate: float) -> Tensor:
    """Which entries a dropout leaves.

    On a GPU by the random numbers of torch's own dropout. On a CPU those take longer than the products they are for:
    there four entries share one number, of whose 65536 values each a share of `1 - rate` (to the nearest) leaves it.
    """
    if values.device.type != "cpu":
        return torch.native_dropout(values, rate, True)[1]
    count = values.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[:count] < round((1.0 - rate) * 2**16) - 2**15).view(values.shape)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` where the mask is, 0 elsewhere."""
    return values if mask is None else mask.to(values.dtype).mul_(values)


def _rows(values: Tensor) -> Tensor:
    """`(..., d)` as `(n, d)`."""
    return values.reshape(-1, values.shape[-1])


def _like(rows: Tensor | None, grad: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if rows is None else rows.view(*grad.shape[:-1], -1).to(dtype)


@functools.cache
def _quantised() -> tuple[type, ...]:
    """The linear layers of bitsandbytes, if it is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return ()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return Linear4bit, Linear8bitLt
