"""How alike are adapters, and how far have they moved? Weights only; no model is needed.

    <Delta W_1, Delta W_2> = s_1 s_2 sum((B_1^T B_2) * (A_1 A_2^T))      summed over the modules
    cosine = <1, 2> / sqrt(<1, 1> <2, 2>),      |1 - 2|^2 = <1, 1> + <2, 2> - 2 <1, 2>

On the factors alone: products of r x r entries, never a Delta W. A module that one adapter lacks is zero in it.
The other view is the factors themselves, `on="factors"`: <1, 2> = sum(A_1 * A_2) + sum(B_1 * B_2). There
(B P, P^-1 A) is another point than (B, A), though the model is the same; it is where fusion averages.

t-SNE puts adapters on a plane so that near ones stay near; its axes and the size of its gaps mean nothing.

Sources: CopRA (arXiv 2410.22911), section 3.3 and figure 5a; van der Maaten and Hinton, "Visualizing data using
t-SNE" (JMLR 9, 2008).
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from copra_llm.adapters import AdapterWeights, LoraFactors, load_adapter_weights
from copra_llm.errors import InputError
from copra_llm.results import Result, environment, peak_memory_bytes
from copra_llm.saved_runs import SavedRun, same_but_seed

KINDS = ("delta", "factors")
EARLY = 0.25
"""Where Early CopRA is taken: this fraction of the run."""
FEWEST_POINTS = 4
"""t-SNE of fewer says nothing."""


def balanced(f: LoraFactors) -> tuple[Tensor, Tensor]:
    """The factors with the scaling shared between them, so that Delta W = B A: `(r, in)` and `(out, r)`, float64."""
    root = math.sqrt(abs(f.scaling))
    return root * f.lora_A.double(), math.copysign(root, f.scaling) * f.lora_B.double()


def inner_products(adapters: Sequence[AdapterWeights], on: str = "delta") -> np.ndarray:
    """All inner products `(n, n)`, float64.

    Args:
        adapters: of one base model.
        on: "delta" (the weight changes) or "factors" (A and B, balanced; equal ranks and targets).

    Raises:
        InputError: if the adapters cannot be compared.
    """
    for other in adapters:
        _check_pair(adapters[0], other, on)
    total = np.zeros((len(adapters), len(adapters)))
    for name in dict.fromkeys(name for a in adapters for name in a.factors):
        have = [i for i, a in enumerate(adapters) if name in a.factors]
        pairs = [balanced(adapters[i].factors[name]) for i in have]
        total[np.ix_(have, have)] += (_delta_products if on == "delta" else _factor_products)(pairs).numpy()
    return total


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosine similarities `(n, n)` from inner products.

    Raises:
        ValueError: if one of them has length 0.
    """
    norms = np.sqrt(np.diag(products))
    if not (norms > 0).all():
        raise ValueError(f"entry {int(np.argmin(norms > 0))} has length 0 and so no direction")
    return products / np.outer(norms, norms)


def distances(products: np.ndarray) -> np.ndarray:
    """Distances `(n, n)` from inner products; good to 1e-8 of the lengths, since it is a difference of squares."""
    squares = np.diag(products)
    apart = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
    np.fill_diagonal(apart, 0.0)
    return (apart + apart.T) / 2


def relative_distance(final: AdapterWeights, early: AdapterWeights) -> float:
    """|Delta W_final - Delta W_early| / |Delta W_final|; 0: nothing has changed since, 1: as far as from nothing."""
    products = inner_products([final, early])
    if products[0, 0] == 0.0:
        raise InputError(f"{final.source} changes nothing: its Delta W is 0, and no distance is relative to it")
    return float(distances(products)[0, 1] / math.sqrt(products[0, 0]))


def tsne(apart: np.ndarray, seed: int = 0, perplexity: float | None = None) -> np.ndarray:
    """Places on a plane `(n, 2)` by t-SNE on a distance matrix (scikit-learn's, exact, random start).

    Args:
        apart: distances `(n, n)`.
        seed: of the random start; one seed gives one picture on one machine.
        perplexity: about how many neighbours count as near; None: a third of the others, 30 at most.

    Raises:
        InputError: if scikit-learn is not installed, there are fewer than 4 points, or the perplexity does not fit.
    """
    if len(apart) < FEWEST_POINTS:
        raise InputError(f"t-SNE of {len(apart)} adapters was asked for; it needs at least {FEWEST_POINTS}")
    perplexity = default_perplexity(len(apart)) if perplexity is None else perplexity
    if not 0 < perplexity < len(apart):
        raise InputError(f"the perplexity is {perplexity:g} for {len(apart)} adapters; it must lie between 0 and that")
    require_scikit_learn()
    from sklearn.manifold import TSNE

    model = TSNE(metric="precomputed", init="random", method="exact", perplexity=perplexity, random_state=seed)
    return np.asarray(model.fit_transform(apart), dtype=float)


def default_perplexity(n: int) -> float:
    """A third of the other points, 30 (scikit-learn's own) at most."""
    return min(30.0, (n - 1) / 3)


def require_scikit_learn() -> None:
    """Say early that t-SNE cannot be made.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise InputError("t-SNE needs scikit-learn: pip install copra_llm[report]")


def similarity_record(
    runs: Sequence[SavedRun], *, on: str = "delta", seed: int = 0, perplexity: float | None = None, **settings
) -> Result:
    """Cosines, t-SNE places and distances from the checkpoint at T/4 of several runs' adapters.

    Args:
        runs: whose adapters are compared; fewer than 4 get no t-SNE places.
        on: "delta" or "factors": what cosines and t-SNE are taken of. The distance from T/4 is always of Delta W.
        seed, perplexity: of t-SNE.
        settings: more entries for the record's config, beside the settings that all runs share.

    Raises:
        InputError: if the adapters cannot be compared, or one changes nothing.
    """
    started = time.time()
    adapters = [run.weights for run in runs]
    products = inner_products(adapters, on)
    idle = next((a for a, square in zip(adapters, np.diag(products), strict=True) if square == 0.0), None)
    if idle is not None:
        raise InputError(f"{idle.source} changes nothing: its {on} is 0 and has no direction; leave it out")
    places = np.full((len(runs), 2), np.nan)
    if len(runs) >= FEWEST_POINTS:
        places = tsne(distances(products), seed, perplexity)
        perplexity = default_perplexity(len(runs)) if perplexity is None else perplexity
    points = [who(run) | {"x": float(x), "y": float(y)} for run, (x, y) in zip(runs, places, strict=True)]
    early = early_distances(runs)
    shared = {k: v for k, v in runs[0].settings.items() if all(r.settings.get(k, ...) == v for r in runs)}
    own = {"on": on, "tsne_seed": seed, "tsne_perplexity": perplexity, "adapters": len(runs)}
    return Result(
        protocol="similarity",
        config=shared | own | settings,
        metrics=_means(runs, cosines(products), early),
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        data={"points": points, "cosine": cosines(products).tolist(), "distance": distances(products).tolist(),
              "early_distance": early},
        environment=environment(base_model=adapters[0].base_model),
    )  # fmt: skip


def early_distances(runs: Sequence[SavedRun]) -> list[dict]:
    """`{method, seed, ..., distance}` of every run whose checkpoint at T/4 was kept."""
    kept = [(run, run.checkpoint(EARLY)) for run in runs]
    return [
        who(run) | {"distance": relative_distance(run.weights, load_adapter_weights(folder))}
        for run, folder in kept
        if folder is not None
    ]


def who(run: SavedRun) -> dict:
    """What tells a run from the others in a picture; None where it is not known."""
    names = ("method", "seed", "learning_rate")
    return {name: run.settings.get(name) for name in names} | {"steps": run.steps(), "label": run.label}


def _means(runs: Sequence[SavedRun], cosine: np.ndarray, early: list[dict]) -> dict[str, float]:
    """Over pairs of runs that differ in their seeds alone, and over the kept checkpoints, by method."""
    metrics = {}
    for method in dict.fromkeys(run.settings.get("method") for run in runs):
        own = [i for i, run in enumerate(runs) if run.settings.get("method") == method]
        pairs = [cosine[i, j] for i in own for j in own if i < j and same_but_seed(runs[i], runs[j])]
        apart = [entry["distance"] for entry in early if entry["method"] == method]
        if pairs:
            metrics[f"cosine_between_seeds/{method}"] = float(np.mean(pairs))
        if apart:
            metrics[f"early_distance/{method}"] = float(np.mean(apart))
    return metrics


def _delta_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """<Delta W_i, Delta W_j> of one module `(n, n)`, all pairs in two products."""
    ranks = [A.shape[0] for A, _ in pairs]
    A = torch.cat([A for A, _ in pairs])  # (R, in), R = sum of ranks
    B = torch.cat([B for _, B in pairs], dim=1)  # (out, R)
    entries = (B.T @ B) * (A @ A.T)  # (R, R)
    return torch.stack([torch.stack([block.sum() for block in row.split(ranks, 1)]) for row in entries.split(ranks)])


def _factor_products(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """sum(A_i * A_j) + sum(B_i * B_j) of one module `(n, n)`."""
    flat = torch.stack([torch.cat([A.flatten(), B.flatten()]) for A, B in pairs])
    return flat @ flat.T


def _check_pair(first: AdapterWeights, other: AdapterWeights, on: str) -> None:
    if on not in KINDS:
        raise InputError(f'adapters were to be compared on "{on}", but must be on one of {", ".join(KINDS)}')
    both = f"{first.source} and {other.source}"
    if first.base_model != other.base_model:
        raise InputError(
            f"{both} have different base models, {first.base_model} and {other.base_model}; compare adapters of one"
        )
    for adapter in (first, other):
        if adapter.config.get("use_dora"):
            raise InputError(f"{adapter.source} is a DoRA adapter, and its Delta W also depends on the base's weights; "
                             "leave it out")  # fmt: skip
    for name in first.factors.keys() & other.factors.keys():
        a, b = (tuple(f.lora_B.shape[:1] + f.lora_A.shape[1:]) for f in (first.factors[name], other.factors[name]))
        if a != b:
            raise InputError(f"{both} differ in the shape of {name}: {a} and {b}; compare adapters of one base")
    if on == "factors":
        shapes = [{name: f.r for name, f in adapter.factors.items()} for adapter in (first, other)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{both} differ in ranks or targets, so their factors have no common space; "
                             "compare them on delta")  # fmt: skip
