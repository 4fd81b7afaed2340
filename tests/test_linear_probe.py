"""The linear probe is the minimum of its objective: scikit-learn's, and one where the gradient is 0."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from copra_llm.linear_probe import best_probe, fit_probe


def data(n: int, noise: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three directions, features of length 1."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = np.eye(6)[labels] + noise * rng.normal(size=(n, 6))
    return F.normalize(torch.tensor(features), dim=-1), torch.tensor(labels)


@pytest.mark.parametrize("l2", [1e-4, 1e-1])
def test_it_is_scikit_learns(l2):
    """Whose C divides the sum of the losses, not their mean, and which does not penalise the bias either."""
    from sklearn.linear_model import LogisticRegression

    features, labels = data(60)
    probe = fit_probe(features, labels, 3, l2)
    theirs = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=10_000).fit(features, labels)
    # Both stop near the minimum, where the objective is flat.
    np.testing.assert_allclose(probe.weight, theirs.coef_, rtol=1e-3, atol=1e-4)
    shifted = probe.bias - probe.bias.mean()
    np.testing.assert_allclose(shifted, theirs.intercept_ - theirs.intercept_.mean(), rtol=1e-3, atol=1e-4)
    assert probe.accuracy(features, labels) == 100 * theirs.score(features, labels)


def test_the_gradient_is_zero():
    features, labels = data(45)
    probe = fit_probe(features, labels, 3, 1e-2)
    weight = probe.weight.clone().requires_grad_()
    (F.cross_entropy(features @ weight.T + probe.bias, labels) + 5e-3 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-7


def test_dev_chooses_the_strength():
    train, dev = data(12, noise=0.8), data(300, noise=0.8, seed=1)
    best = best_probe(train, dev, 3, strengths=(1e-7, 1e-2, 1e1))
    accuracies = {l2: fit_probe(*train, 3, l2).accuracy(*dev) for l2 in (1e-7, 1e-2, 1e1)}
    assert best.accuracy(*dev) == max(accuracies.values()) > min(accuracies.values())
