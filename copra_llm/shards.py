"""How is a training set divided among K clients?

    iid         a random permutation of the n examples, cut into K parts of n / K (sizes differ by one at most)
    dirichlet   for every label c the shares  q_c ~ Dirichlet(beta, ..., beta)  over the clients;
                the examples of c, permuted, are cut where the cumulated shares say

Small beta: a client sees few labels, and the clients' sizes differ; large beta: nearly iid, label by label. The parts
are disjoint, cover everything, and none is empty: where Dirichlet's law leaves a client nothing, it gets one random
example of the client that has most. A pure function of its arguments; no global generator moves.

Source: CopRA (arXiv 2410.22911), section 3.1 (iid, five clients); Hsu et al. (arXiv 1909.06335) and Li et al.
(arXiv 2102.02079), section 4.1 (Dirichlet, label by label).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copra_llm.errors import InputError


def shards(labels: Sequence[int], num_clients: int, *, split: str, beta: float, seed: int) -> list[np.ndarray]:
    """The examples of each client.

    Args:
        labels: of the training set `(n,)`.
        num_clients: K, at least 1.
        split: "iid" or "dirichlet".
        beta: concentration of the Dirichlet law, positive; "iid" does not read it.
        seed: of the division, in [0, 2**64).

    Returns:
        K arrays of indices into the training set, each increasing.

    Raises:
        InputError: if there are fewer examples than clients.
    """
    labels = np.asarray(labels)
    if len(labels) < num_clients:
        raise InputError(f"{len(labels)} training examples cannot be divided among {num_clients} clients; give fewer "
                         "clients or more examples")  # fmt: skip
    rng = np.random.Generator(np.random.Philox(key=seed))
    if split == "iid":
        parts = np.array_split(rng.permutation(len(labels)), num_clients)
    else:
        parts = _none_empty(_by_label(labels, num_clients, beta, rng), rng)
    return [np.sort(part) for part in parts]


def _by_label(labels: np.ndarray, num_clients: int, beta: float, rng: np.random.Generator) -> list[np.ndarray]:
    parts = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = np.round(np.cumsum(rng.dirichlet(np.full(num_clients, beta)))[:-1] * len(members)).astype(int)
        for part, own in zip(parts, np.split(members, ends), strict=True):
            part.append(own)
    return [np.concatenate(part) for part in parts]


def _none_empty(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    for k, part in enumerate(parts):
        if not len(part):
            largest = max(range(len(parts)), key=lambda i: len(parts[i]))
            given = rng.integers(len(parts[largest]))
            parts[k] = parts[largest][given : given + 1]
            parts[largest] = np.delete(parts[largest], given)
    return parts
