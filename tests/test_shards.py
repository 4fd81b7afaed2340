"""How a training set is divided among clients: `copra_llm.shards`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copra_llm.errors import InputError
from copra_llm.shards import shards

LABELS = np.repeat(np.arange(4), 50)


@st.composite
def divisions(draw) -> tuple[list[int], int, dict]:
    clients = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, 5), min_size=clients, max_size=120))
    split = draw(st.sampled_from(["iid", "dirichlet"]))
    beta = draw(st.floats(1e-4, 1e4))
    return labels, clients, {"split": split, "beta": beta, "seed": draw(st.integers(0, 2**64 - 1))}


@given(divisions())
@settings(deadline=None, max_examples=200)
def test_parts_are_disjoint_cover_all_and_none_is_empty(division):
    labels, clients, how = division
    parts = shards(labels, clients, **how)
    assert len(parts) == clients and all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)


@given(divisions())
@settings(deadline=None, max_examples=50)
def test_the_same_arguments_give_the_same_parts_and_move_no_generator(division):
    labels, clients, how = division
    state = np.random.get_state()[1].copy()
    first, again = (shards(labels, clients, **how) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(np.random.get_state()[1], state)


@given(st.integers(1, 9), st.integers(9, 100))
@settings(deadline=None)
def test_iid_sizes_differ_by_one_at_most(clients, n):
    sizes = [len(part) for part in shards([0] * n, clients, split="iid", beta=0.5, seed=3)]
    assert max(sizes) - min(sizes) <= 1


def test_iid_does_not_read_the_labels():
    one, other = (shards(labels, 5, split="iid", beta=0.5, seed=1) for labels in (LABELS, LABELS[::-1]))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_seeds_divide_differently():
    one, other = (shards(LABELS, 5, split="iid", beta=0.5, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one[0], other[0])


def skew(beta: float) -> float:
    """Mean over seeds and clients of the largest label's share."""
    parts = [shards(LABELS, 5, split="dirichlet", beta=beta, seed=seed) for seed in range(20)]
    return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for group in parts for part in group]))


def test_small_beta_is_skewed_and_large_beta_is_even():
    """Of four equal labels a client's largest share is near 1 at beta = 0.01, and near 1/4 at beta = 1000."""
    assert skew(0.01) > 0.85 > skew(0.5) > 0.45 > 0.3 > skew(1000.0)


def test_the_shares_of_a_label_follow_the_dirichlet_law():
    """Over seeds the first client's share of a label has mean 1/K and variance (K - 1) / (K^2 (K beta + 1))."""
    labels, clients, beta = [0] * 1000, 4, 0.5
    shares = [len(shards(labels, clients, split="dirichlet", beta=beta, seed=s)[0]) / 1000 for s in range(600)]
    variance = (clients - 1) / (clients**2 * (clients * beta + 1))
    # Four standard errors of the mean and (kurtosis below 6) of the variance over 600 draws.
    assert np.mean(shares) == pytest.approx(1 / clients, abs=4 * (variance / 600) ** 0.5)
    assert np.var(shares) == pytest.approx(variance, rel=4 * (5 / 600) ** 0.5)


def test_golden_parts():
    """The division belongs to the records: a change of it would make them another experiment's."""
    iid = shards([0, 1] * 5, 3, split="iid", beta=0.5, seed=0)
    skewed = shards([0, 1] * 5, 3, split="dirichlet", beta=0.5, seed=0)
    assert [part.tolist() for part in iid] == IID
    assert [part.tolist() for part in skewed] == SKEWED


IID = [[0, 6, 7, 8], [1, 5, 9], [2, 3, 4]]
SKEWED = [[2], [4], [0, 1, 3, 5, 6, 7, 8, 9]]


def test_fewer_examples_than_clients_are_refused():
    with pytest.raises(InputError, match="2 training examples cannot be divided among 3 clients; give fewer"):
        shards([0, 1], 3, split="iid", beta=0.5, seed=0)
