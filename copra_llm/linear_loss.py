"""What does each token cost, without the logits of all tokens in memory?

    nll_i = logsumexp(W h_i) - (W h_i)[y_i]          [nats]

Logits over a vocabulary are the largest tensor of a language model's step: 50 000 float32 numbers a token, and as
many for their gradient. Here they exist for a chunk of tokens at a time. Where the output layer is frozen, as under
LoRA, a chunk's gradient with respect to its hidden states is known as soon as its logits are,

    d nll_i / d h_i = W^T (softmax(W h_i) - onehot(y_i)),

and is kept instead of them: `(n, hidden)` numbers, and nothing is computed twice. An output layer that is trained or
adapted is computed again chunk by chunk in the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 256
"""Tokens whose logits exist at once: enough to fill a matrix product, 50 MB of float32 at 50 000 words."""


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The loss of each token, and whether it is the likeliest one.

    Args:
        hidden: last hidden states `(n, hidden)`.
        head: the output layer, `(n, hidden)` -> logits `(n, vocabulary)`.
        targets: token ids `(n,)`.
        chunk: tokens at once; changes results by rounding at most, since rows are independent.

    Returns:
        -log p(target) in nats, float32 `(n,)`; and bool `(n,)`, without a gradient.
    """
    if torch.is_grad_enabled() and hidden.requires_grad and type(head) is nn.Linear and not _trained(head):
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, chunk)
    again = torch.is_grad_enabled() and (hidden.requires_grad or _trained(head))
    losses, right = [], []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if again:
            loss, hit = checkpoint(_chunk_losses, h, head, y, use_reentrant=False)
        else:
            loss, hit = _chunk_losses(h, head, y)
        losses.append(loss)
        right.append(hit)
    return torch.cat(losses), torch.cat(right)


def _trained(head: nn.Module) -> bool:
    return any(p.requires_grad for p in head.parameters())


def _chunk_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _likeliest(logits: Tensor, own: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the target is the first of the largest logits `(n,)`, and the largest one `(n, 1)`.

    Args:
        logits: `(n, vocabulary)`.
        own: those of the targets `(n, 1)`.
        y: the targets `(n, 1)`.
    """
    # A subclass, as where nothing but shapes is computed, has no numbers to ask for.
    if logits.device.type != "cpu" or type(logits) is not Tensor:
        return logits.argmax(-1, keepdim=True).eq(y).squeeze(1), logits.amax(-1, keepdim=True)
    # Where the largest one stands takes a CPU several times as long to find as how large it is: asked for ties alone.
    others = logits.scatter_(1, y, -torch.inf).amax(-1, keepdim=True)
    logits.scatter_(1, y, own)
    right = (own > others).squeeze(1)
    ties = (own == others).squeeze(1).nonzero().squeeze(1)
    right[ties] = logits[ties].argmax(-1) == y[ties, 0]
    return right, torch.maximum(own, others)


class _FrozenHead(torch.autograd.Function):
    """`token_losses` for a linear layer without trained parameters."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int):
        losses = hidden.new_empty(len(targets), dtype=torch.float32)
        right = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            y = targets[part, None]
            logits = F.linear(hidden[part], weight, bias).float()  # (chunk, vocabulary)
            own = logits.gather(1, y)
            right[part], top = _likeliest(logits, own, y)
            # In place, since the logits are not needed again; a pass over them takes longer than all of the rest.
            pull = logits.sub_(top).exp_()
            total = pull.sum(-1, keepdim=True)
            losses[part] = (total.log() + top - own).squeeze(1)
            pull.div_(total).scatter_add_(1, y, pull.new_full(y.shape, -1.0))
            gradient[part] = F.linear(pull.to(weight.dtype), weight.T)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return losses, right

    @staticmethod
    def backward(ctx, of_losses: Tensor, of_right: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * of_losses.unsqueeze(1).to(gradient.dtype), None, None, None, None
