"""Are two adapters linearly mode-connected?

    m(alpha) for alpha in [0, 1],    alpha the weight of the FIRST adapter, m(1) the first alone
    accuracy barrier = max_alpha [alpha m(1) + (1 - alpha) m(0) - m(alpha)]      (loss: the sign turned)

A maximum over noisy points is biased upward, so the middle point stands beside it with a paired bootstrap
interval over the examples. One model is loaded; its adapter's weights are swapped in place, so 21 points
cost 21 passes over the data.

Source: CopRA (arXiv 2410.22911), section 3.1 and figure 3.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from peft import set_peft_model_state_dict

from copra_llm.adapters import AdapterWeights, save_adapter_weights
from copra_llm.batches import EncodedSplit
from copra_llm.build import Workbench
from copra_llm.errors import InputError
from copra_llm.evaluate import Evaluation, evaluate
from copra_llm.merge import merge
from copra_llm.results import Result, environment, pack_bits, peak_memory_bytes


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


def bootstrap_mean(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values (n,)` and its 95 % percentile bootstrap interval over resampled examples."""
    rng, n = np.random.default_rng(seed), len(values)
    # One draw at a time: all of them at once are gigabytes for the larger test sets.
    means = [values[rng.integers(0, n, n)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interpolate(
    first: AdapterWeights,
    second: AdapterWeights,
    *,
    method: str,
    alphas: np.ndarray,
    bench_of: Callable[[Path], Workbench],
    split: str,
    task: str,
    batch_size: int,
    progress: Callable = iter,
) -> Curve:
    """Evaluate the merge of two adapters at every weight.

    Args:
        first, second: the ends; `first` has weight alpha.
        method: a key of `copra_llm.merge.METHODS`.
        alphas: weights of the first adapter `(points,)`.
        bench_of: builds the model with the adapter found in a folder, and the data; called once.
        split, task: what is evaluated.
        batch_size: examples in one forward pass.
        progress: wraps the iterable of weights, e.g. `tqdm`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        # Any point of the line has the shapes of all of them.
        save_adapter_weights(merge([first, second], method, [0.5, 0.5]), Path(scratch) / "adapter")
        bench = bench_of(Path(scratch) / "adapter")
    accelerator = Accelerator()
    bench.classifier.to(accelerator.device)
    examples = bench.splits[split][task]
    outcomes = [
        evaluate_weights(accelerator, bench, merge([first, second], method, [a, 1 - a]), examples, batch_size)
        for a in progress(list(map(float, alphas)))
    ]
    return Curve(np.asarray(alphas), np.stack([o.correct for o in outcomes]), np.stack([o.nll for o in outcomes]))


def evaluate_weights(
    accelerator: Accelerator, bench: Workbench, weights: AdapterWeights, examples: EncodedSplit, batch_size: int
) -> Evaluation:
    """Swap weights of the loaded adapter's shapes into the model, and evaluate."""
    set_peft_model_state_dict(bench.classifier.model, weights.state_dict())
    return evaluate(accelerator, bench.classifier, examples, batch_size)


def curve_record(curve: Curve, settings: dict, bench: Workbench, seconds: float) -> Result:
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
        environment=environment(base_model=bench.base.source.name, base_fingerprint=bench.base.fingerprint),
    )
