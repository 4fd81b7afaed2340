"""What does the loss look like on the plane through three adapters?

    u = w_2 - w_1,    v = w_3 - w_1 - <w_3 - w_1, u> u / |u|^2                             (Gram-Schmidt)
    P(x, y) = w_1 + x u / |u| + y v / |v| = a w_1 + b w_2 + c w_3,    a + b + c = 1

w_i is everything adapter i has learned as one vector: the entries of its factors A and B, module after module, with
the scaling shared equally between the two. In these coordinates fusion is linear, so every point of the plane is a
fusion of the three, and distances on it are distances of factors. Delta W is not linear on it: B A has cross terms.
Outside the triangle of the three some weights are negative. Evaluations spent: grid^2 + 4, the corners and the
centre (a = b = c = 1/3) beside the grid.

Source: Garipov et al., "Loss surfaces, mode connectivity, and fast ensembling of DNNs" (NeurIPS 2018), figure 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluate import Evaluation
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.results import Result, peak_memory_bytes
from copra_llm.similarity import inner_products

MARGIN = 0.2
"""How far the grid goes beyond the corners on every side, as a fraction of their extent."""


@dataclass(frozen=True)
class Plane:
    """The plane through three points, with the first as its origin."""

    second: float
    """The second lies at `(second, 0)`."""
    third: tuple[float, float]

    @property
    def corners(self) -> np.ndarray:
        """`(3, 2)`."""
        return np.array([(0.0, 0.0), (self.second, 0.0), self.third])

    @property
    def centre(self) -> tuple[float, float]:
        """Where all three have the weight 1/3."""
        return tuple(self.corners.mean(0).tolist())

    def weights(self, x: float, y: float) -> list[float]:
        """The three's weights at a point; they sum to 1, and at a corner one of them is exactly 1."""
        c = y / self.third[1]
        b = (x - c * self.third[0]) / self.second
        return [1.0 - b - c, b, c]

    def grid(self, points: int, margin: float = MARGIN) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates `(points,)` along x and along y that enclose the corners.

        Raises:
            InputError: if there are fewer than two points, or the margin is negative.
        """
        if points < 2:
            raise InputError(f"a grid of {points} x {points} points was asked for; give at least 2")
        if not 0.0 <= margin < math.inf:
            raise InputError(f"the grid's margin is {margin:g}, but must not be negative")
        low, high = self.corners.min(0), self.corners.max(0)
        more = margin * (high - low)
        x, y = np.linspace(low - more, high + more, points).T
        return x, y


def plane_through(adapters: Sequence[AdapterWeights]) -> Plane:
    """The plane of three adapters' factors.

    Raises:
        InputError: if there are not three, they have no common space (base, ranks, targets), or lie on one line.
    """
    if len(adapters) != 3:
        raise InputError(f"{len(adapters)} adapters were given, but a plane goes through three")
    products = inner_products(adapters, on="factors")
    # Squares are known to 1e-16 of their size, so a distance below 1e-6 of an adapter's length is none.
    smallest = 1e-12 * float(products.diagonal().max())
    # Of the differences to the first: <w_i - w_1, w_j - w_1>.
    products = products - products[:1] - products[:, :1] + products[0, 0]
    base = float(products[1, 1])
    across = float(products[2, 2]) - float(products[1, 2]) ** 2 / base if base > smallest else 0.0
    if across <= smallest:
        names = ", ".join(a.source for a in adapters)
        raise InputError(f"{names} lie on one line, so there is no plane through them; give three different adapters")
    second = math.sqrt(base)
    return Plane(second, (float(products[1, 2]) / second, math.sqrt(across)))


@dataclass(frozen=True)
class Landscape:
    """Outcomes on a plane."""

    plane: Plane
    x: np.ndarray
    """`(nx,)`."""
    y: np.ndarray
    """`(ny,)`."""
    accuracy: np.ndarray
    """Percent `(ny, nx)`."""
    loss: np.ndarray
    """Nats `(ny, nx)`."""
    corners: list[Evaluation]
    """The three adapters alone."""
    centre: Evaluation
    """Their fusion with equal weights."""


def landscape(
    adapters: Sequence[AdapterWeights],
    evaluator: AdapterEvaluator,
    task: str,
    *,
    points: int,
    margin: float = MARGIN,
    progress: Callable = iter,
) -> Landscape:
    """Evaluate the fusions of three adapters on a grid.

    Args:
        adapters: the corners.
        evaluator: the model and the split.
        task: what is evaluated.
        points: of the grid, along each side.
        margin: of the grid around the corners.
        progress: wraps the iterable of points.

    Raises:
        InputError: if the adapters cannot be fused, or span no plane.
    """
    merge(adapters, "fusion")
    plane = plane_through(adapters)
    x, y = plane.grid(points, margin)

    def at(place: tuple[float, float]) -> Evaluation:
        return evaluator(merge(adapters, "fusion", plane.weights(*place)), task)

    places = [(float(a), float(b)) for b in y for a in x]
    special = [*map(tuple, plane.corners.tolist()), plane.centre]
    outcomes = [at(place) for place in progress(special + places)]
    around = outcomes[len(special) :]
    accuracy, loss = (np.array([getattr(o, q) for o in around]).reshape(len(y), len(x)) for q in ("accuracy", "loss"))
    return Landscape(plane, x, y, accuracy, loss, outcomes[:3], outcomes[3])


def plane_record(
    adapters: Sequence[AdapterWeights],
    config: RunConfig,
    task: str,
    *,
    points: int,
    margin: float = MARGIN,
    labels: Sequence[str] | None = None,
    split: str = "test",
    settings: dict | None = None,
    evaluator: AdapterEvaluator | None = None,
    progress: Callable = iter,
) -> Result:
    """The plane through three adapters as a result record.

    Args:
        adapters: the corners.
        config: the run's settings: model, data, batch size; kept in the record.
        task, split: what is evaluated.
        points, margin: of the grid.
        labels: the corners' names; None: A, B, C.
        settings: more entries for the record's config.
        evaluator: of this config and split, if there is one already.
        progress: wraps the iterable of points.
    """
    started = time.time()
    evaluator = evaluator or AdapterEvaluator(config, [task], split)
    seen = landscape(adapters, evaluator, task, points=points, margin=margin, progress=progress)
    own = {"label": config.schedule.method, "merge_method": "fusion", "merge_options": {}, "split": split,
           "task": task, "points": points, "margin": margin}  # fmt: skip
    where = f"{split}/{task}"
    corners = zip(labels or "ABC", seen.plane.corners.tolist(), seen.corners, strict=True)
    return Result(
        protocol="plane",
        config=own | (settings or {}) | config.flat(),
        metrics={
            f"{where}/accuracy_corners": float(np.mean([c.accuracy for c in seen.corners])),
            f"{where}/accuracy_centre": seen.centre.accuracy,
            f"{where}/loss_corners": float(np.mean([c.loss for c in seen.corners])),
            f"{where}/loss_centre": seen.centre.loss,
            "evaluations": points**2 + len(seen.corners) + 1,
        },
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        data={
            "x": seen.x.tolist(),
            "y": seen.y.tolist(),
            "accuracy": seen.accuracy.tolist(),
            "loss": seen.loss.tolist(),
            "corners": [_place(*corner) for corner in corners],
            "centre": _place("centre", seen.plane.centre, seen.centre),
        },
        environment=evaluator.environment(),
    )


def _place(label: str, place: Sequence[float], outcome: Evaluation) -> dict:
    return {"label": label, "x": place[0], "y": place[1], "accuracy": outcome.accuracy, "loss": outcome.loss}
