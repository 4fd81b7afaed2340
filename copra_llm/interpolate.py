"""Are two adapters linearly mode-connected?

    m(alpha) for alpha in [0, 1],    alpha the weight of the FIRST adapter, m(1) the first alone
    accuracy barrier = max_alpha [alpha m(1) + (1 - alpha) m(0) - m(alpha)]      (loss: the sign turned)

A maximum over noisy points is biased upward, so the middle point stands beside it with a paired bootstrap
interval over the examples. One model is loaded; its adapter's weights are swapped in place, so 21 points
cost 21 passes over the data.

Source: CopRA (arXiv 2410.22911), section 3.1 and figure 3.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.estimates import bootstrap_mean
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import check_fit, check_line, check_options, merge
from copra_llm.results import Result, pack_bits, peak_memory_bytes


@dataclass(frozen=True)
class Curve:
    """Outcomes along the line between two adapters."""

    alpha: np.ndarray
    """Weight of the first adapter `(points,)`, increasing from 0 to 1."""
    correct: np.ndarray
    """bool `(points, n)`."""
    nll: np.ndarray
    """nats `(points, n)`."""

    @property
    def accuracy(self) -> np.ndarray:
        """Percent `(points,)`."""
        return 100.0 * self.correct.mean(1)

    @property
    def loss(self) -> np.ndarray:
        """Nats `(points,)`."""
        return self.nll.mean(1)

    @property
    def middle(self) -> int:
        """Index of alpha = 0.5."""
        middle = int(np.argmin(abs(self.alpha - 0.5)))
        if not np.isclose(self.alpha[middle], 0.5):
            raise ValueError(f"no point of the curve is its middle; the nearest one is {self.alpha[middle]:g}")
        return middle

    def accuracy_barrier(self) -> float:
        """Percentage points."""
        return float(np.max(self._chord(self.accuracy) - self.accuracy))

    def loss_barrier(self) -> float:
        """Nats."""
        return float(np.max(self.loss - self._chord(self.loss)))

    def middle_drop(self) -> tuple[float, float, float]:
        """Mean of the two ends minus the middle, in percentage points, with a 95 % bootstrap interval."""
        middle = self.correct[self.middle]
        ends = (self.correct[0].astype(float) + self.correct[-1]) / 2
        return bootstrap_mean(100.0 * (ends - middle))

    def _chord(self, values: np.ndarray) -> np.ndarray:
        return self.alpha * values[-1] + (1 - self.alpha) * values[0]


def line(points: int) -> np.ndarray:
    """`points` weights from 0 to 1.

    Raises:
        InputError: if the ends and the middle are not all among them.
    """
    if points < 3 or points % 2 == 0:
        raise InputError(f"a line of {points} points was asked for, but points must be odd and at least 3: "
                         "both ends and the middle")  # fmt: skip
    return np.linspace(0.0, 1.0, points)


def interpolate(
    first: AdapterWeights,
    second: AdapterWeights,
    evaluator: AdapterEvaluator,
    task: str,
    *,
    method: str,
    alphas: np.ndarray,
    merge_options: dict | None = None,
    progress: Callable = iter,
) -> Curve:
    """Evaluate the merge of two adapters at every weight.

    Args:
        first, second: the ends; `first` has weight alpha.
        evaluator: the model and the split.
        task: what is evaluated.
        method: one of `copra_llm.merge.LINES`.
        alphas: weights of the first adapter `(points,)`.
        merge_options: the rule's.
        progress: wraps the iterable of weights, e.g. `tqdm`.
    """
    check_line(method)
    options = check_options(method, merge_options or {})
    check_fit([first, second], method, options)

    def at(alpha: float) -> AdapterWeights:
        # A line ends in the adapters themselves, and whoever evaluates many lines knows them again.
        ends = {1.0: first, 0.0: second}
        return ends.get(alpha) or merge([first, second], method, [alpha, 1 - alpha], **options)

    outcomes = [evaluator(at(alpha), task) for alpha in progress(list(map(float, alphas)))]
    return Curve(np.asarray(alphas), np.stack([o.correct for o in outcomes]), np.stack([o.nll for o in outcomes]))


def line_record(
    ends: list[AdapterWeights],
    config: RunConfig,
    task: str,
    *,
    method: str,
    points: int,
    split: str = "test",
    merge_options: dict | None = None,
    settings: dict | None = None,
    evaluator: AdapterEvaluator | None = None,
    progress: Callable = iter,
) -> Result:
    """The line between two adapters as a result record.

    Args:
        ends: the two adapters.
        config: the run's settings: model, data, batch size; kept in the record.
        task, split: what is evaluated.
        method: one of `copra_llm.merge.LINES`.
        points: of the line, both ends and the middle among them.
        merge_options: the rule's.
        settings: more entries for the record's config.
        evaluator: of the run's model and this split; None: one for this line.
        progress: wraps the iterable of weights.
    """
    started = time.time()
    evaluator = evaluator or AdapterEvaluator(config, [task], split)
    rule = {"method": method, "merge_options": merge_options or {}}
    curve = interpolate(*ends, evaluator, task, alphas=line(points), progress=progress, **rule)
    own = {"label": config.schedule.method, "merge_method": method, "merge_options": merge_options or {}}
    own |= {"split": split, "task": task, "points": points}
    return curve_record(curve, own | (settings or {}) | config.flat(), evaluator, time.time() - started)


def curve_record(curve: Curve, settings: dict, evaluator: AdapterEvaluator, seconds: float) -> Result:
    """A curve as a result record; `settings` must hold split and task."""
    where = f"{settings['split']}/{settings['task']}"
    drop, low, high = curve.middle_drop()
    middle = curve.middle
    metrics = {
        f"{where}/accuracy@0": float(curve.accuracy[0]),
        f"{where}/accuracy@0.5": float(curve.accuracy[middle]),
        f"{where}/accuracy@1": float(curve.accuracy[-1]),
        f"{where}/loss@0": float(curve.loss[0]),
        f"{where}/loss@0.5": float(curve.loss[middle]),
        f"{where}/loss@1": float(curve.loss[-1]),
        f"{where}/accuracy_barrier": curve.accuracy_barrier(),
        f"{where}/loss_barrier": curve.loss_barrier(),
        f"{where}/middle_drop": drop,
        f"{where}/middle_drop_low": low,
        f"{where}/middle_drop_high": high,
    }
    data = {
        "alpha": curve.alpha.tolist(),
        "accuracy": curve.accuracy.tolist(),
        "loss": curve.loss.tolist(),
        "correct": [pack_bits(row) for row in curve.correct],
    }
    return Result(
        protocol="interpolation",
        config=settings,
        metrics=metrics,
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        data=data,
        environment=evaluator.environment(),
    )
