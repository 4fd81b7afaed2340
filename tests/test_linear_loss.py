"""The loss by chunks is the loss of all logits at once, and so is its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from copra_llm.linear_loss import token_losses

HIDDEN, VOCABULARY, TOKENS = 12, 37, 21


def inputs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    return hidden, targets, weights


def head_of(kind: str) -> nn.Module:
    torch.manual_seed(3)
    head = nn.Linear(HIDDEN, VOCABULARY, bias="bias" in kind)
    if "trained" not in kind:
        head.requires_grad_(False)
    return nn.Sequential(head) if "wrapped" in kind else head


def whole(hidden, head, targets):
    """All logits at once, by torch."""
    logits = head(hidden).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@pytest.mark.parametrize("kind", ["frozen", "frozen bias", "trained bias", "wrapped", "wrapped trained"])
@pytest.mark.parametrize("chunk", [1, 5, TOKENS, 100])
def test_chunks_change_nothing(kind, chunk):
    """Every token's loss, every weighting of them in the backward pass, and the output layer's own gradient."""
    outcomes = []
    for loss_of in (whole, lambda *a: token_losses(*a, chunk)):
        hidden, targets, weights = inputs(0, torch.float32)
        head = head_of(kind)
        hidden.requires_grad_(True)
        losses, right = loss_of(hidden, head, targets)
        (losses * weights).sum().backward()
        of_head = [p.grad for p in head.parameters()]
        outcomes.append((losses.detach(), right, hidden.grad, *(g for g in of_head if g is not None)))
    assert len(outcomes[0]) == len(outcomes[1]) == 3 + ("trained" in kind) * (1 + ("bias" in kind))
    for expected, found in zip(*outcomes, strict=True):
        # float32 products of 12 and 37 terms, added in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    head = head_of("frozen").double()
    hidden, targets, weights = inputs(1)
    hidden = hidden[:4].requires_grad_(True)

    def loss(h):
        return (token_losses(h, head, targets[:4], 3)[0].double() * weights[:4]).sum()

    # Losses are float32, so steps must be large: 1e-2, whose own error is of its square.
    assert torch.autograd.gradcheck(loss, (hidden,), eps=1e-2, atol=2e-3)


def test_without_gradients_nothing_is_kept():
    hidden, targets, _ = inputs(2, torch.float32)
    with torch.inference_mode():
        losses, right = token_losses(hidden, head_of("frozen"), targets, 4)
    assert not losses.requires_grad and right.dtype == torch.bool
    torch.testing.assert_close(losses, whole(hidden, head_of("frozen"), targets)[0])


@pytest.mark.parametrize("seed", range(5))
def test_of_equal_logits_the_first_is_the_likeliest(seed):
    """As argmax has it: with few different logits most tokens have ties, targets among them and not."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(2, 12, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randint(-1, 2, (12, 2), generator=generator))
    hidden = torch.randint(-1, 2, (200, 2), generator=generator).float()
    targets = torch.randint(0, 12, (200,), generator=generator)
    _, right = token_losses(hidden.clone().requires_grad_(), head, targets, chunk=64)
    _, plain = token_losses(hidden, head, targets)
    assert torch.equal(right, head(hidden).argmax(-1) == targets) and torch.equal(right, plain)
    assert 0 < right.sum() < 200


def test_no_token_has_no_loss():
    hidden, targets, _ = inputs(2, torch.float32)
    losses, right = token_losses(hidden[:0].requires_grad_(True), head_of("frozen"), targets[:0])
    assert losses.shape == right.shape == (0,)
    losses.sum().backward()


def test_under_autocast_the_loss_stays_float32():
    """bfloat16 logits are made float32 before the softmax; the gradient is the hidden states' own type."""
    hidden, targets, _ = inputs(4, torch.bfloat16)
    hidden.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = token_losses(hidden, head_of("frozen"), targets, 5)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    reference = hidden.detach().float().requires_grad_(True)
    F.cross_entropy(head_of("frozen")(reference), targets, reduction="sum").backward()
    # bfloat16 has 8 bits: relative 2^-8, on a sum of up to 37 terms below 1
    torch.testing.assert_close(hidden.grad.float(), reference.grad, rtol=2e-2, atol=2e-2)


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """The largest tensor that the output layer makes is one chunk's."""
    seen = []
    linear = F.linear

    def watched(*args, **kwargs):
        out = linear(*args, **kwargs)
        seen.append(out.shape)
        return out

    monkeypatch.setattr("copra_llm.linear_loss.F.linear", watched)
    hidden, targets, _ = inputs(5, torch.float32)
    token_losses(hidden.requires_grad_(True), head_of("frozen"), targets, 4)[0].sum().backward()
    rows = [shape[0] for shape in seen if shape[1] == VOCABULARY]
    assert sum(rows) == TOKENS and max(rows) == 4
