"""Is one layer alone connected? Lines on which a single layer is interpolated, all others staying the first adapter's.

    m_l(alpha)         layer l merged from both adapters, weight alpha on the FIRST; other layers: the first's
    barrier_l          = max_alpha [alpha m_l(1) + (1 - alpha) m_l(0) - m_l(alpha)]        (loss: the sign turned)
    averaging barrier_l = (m(1) + m(0)) / 2 - m_l(1/2)

m_l(1) is the first adapter, m_l(0) the first with the second's layer l; m(1) and m(0) are the two whole adapters.
The barrier is the depth below the line's own ends, as for whole adapters: 0 for a layer in which both agree, and
the whole barrier if all layers are interpolated at once. The averaging barrier is the one Adilova et al. plot: one
point (so without a maximum's bias) against the two whole models, negative where swapping a layer in does good.
Neither is symmetric: the other order keeps the second adapter's layers. What lies outside transformer blocks is
interpolated in the whole line alone. Evaluations spent: layers * (points - 1) + points + 1.

Sources: Adilova et al., "Layer-wise linear mode connectivity" (ICLR 2024), their measure as their published code
has it; CopRA (arXiv 2410.22911), section 1, whose motivation it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluate import Evaluation
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.gates import group_players
from copra_llm.interpolate import Curve, line
from copra_llm.merge import merge
from copra_llm.results import Result, peak_memory_bytes


@dataclass(frozen=True)
class LayerLines:
    """The lines of all layers, and of the whole adapter."""

    layers: list[str]
    """Players' names, in mask order."""
    lines: list[Curve]
    """One a layer."""
    whole: Curve
    """All layers at once, and what lies outside them."""

    def averaging_barriers(self, quantity: str) -> np.ndarray:
        """`(layers + 1,)`, the last one of the whole: "accuracy" in percentage points, "loss" in nats; positive is
        worse than the mean of the two whole adapters."""
        values = getattr(self.whole, quantity)
        middles = np.array([getattr(curve, quantity)[curve.middle] for curve in (*self.lines, self.whole)])
        lost = (values[0] + values[-1]) / 2 - middles
        return lost if quantity == "accuracy" else -lost

    def metrics(self, prefix: str) -> dict[str, float]:
        """`{prefix}/{accuracy,loss}_barrier/<layer>`, `..._mean` over the layers, `..._whole`, and the same of the
        averaging barrier."""
        values: dict[str, float] = {}
        for quantity in ("accuracy", "loss"):
            own = [getattr(curve, f"{quantity}_barrier")() for curve in (*self.lines, self.whole)]
            for kind, barriers in (("barrier", own), ("averaging_barrier", self.averaging_barriers(quantity))):
                name = f"{prefix}/{quantity}_{kind}"
                values |= {f"{name}/{layer}": float(b) for layer, b in zip(self.layers, barriers, strict=False)}
                values |= {f"{name}_mean": float(np.mean(barriers[:-1])), f"{name}_whole": float(barriers[-1])}
        return values


def layers_of(adapters: Sequence[AdapterWeights], layer_pattern: str | None = None) -> dict[str, list[str]]:
    """The adapters' modules by layer, in mask order.

    Raises:
        InputError: if no module lies in a numbered transformer block, or the pattern is no regular expression.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)
    layers = group_players(names, "layer", layer_pattern)
    if not layers:
        raise InputError(f"{adapters[0].source} adapts no module inside a numbered transformer block, so there is no "
                         "layer to interpolate; give --layer_pattern")  # fmt: skip
    return layers


def merge_modules(
    first: AdapterWeights,
    second: AdapterWeights,
    modules: Sequence[str],
    method: str,
    alpha: float,
    merge_options: dict[str, Any] | None = None,
) -> AdapterWeights:
    """The first adapter with some modules merged with the second's.

    The rule sees these modules alone, so one that looks across modules (a threshold over a whole adapter, say)
    finds it for them.

    Args:
        first, second: the ends; `first` has weight `alpha`.
        modules: names in the base model; of all other modules the first's factors stay as they are.
        method, merge_options: of `copra_llm.merge.merge`.
    """
    chosen = set(modules)
    parts = [
        dataclasses.replace(a, factors={name: f for name, f in a.factors.items() if name in chosen})
        for a in (first, second)
    ]
    merged = merge(parts, method, [alpha, 1 - alpha], **(merge_options or {}))
    return first.with_factors(first.factors | merged.factors, merged.source)


def layer_lines(
    first: AdapterWeights,
    second: AdapterWeights,
    evaluator: AdapterEvaluator,
    task: str,
    *,
    method: str,
    alphas: np.ndarray,
    layer_pattern: str | None = None,
    merge_options: dict[str, Any] | None = None,
    progress: Callable = iter,
) -> LayerLines:
    """Evaluate every layer's line and the whole one.

    Args:
        first, second: the ends; `first` has weight alpha and lends the layers that are not interpolated.
        evaluator: the model and the split.
        task: what is evaluated.
        method, merge_options: of `copra_llm.merge.merge`.
        alphas: weights of the first adapter `(points,)`, from 0 to 1.
        layer_pattern: regular expression whose match ends a layer's name; None: the first integer in it.
        progress: wraps the iterable of evaluations.
    """
    layers = layers_of([first, second], layer_pattern)
    everything = list(dict.fromkeys([*first.factors, *second.factors]))
    # With all its weight on the first adapter every layer's line is that adapter, whatever the rule.
    jobs: list[tuple[str | None, float]] = [(layer, float(a)) for layer in layers for a in alphas[:-1]]
    jobs += [(None, float(a)) for a in alphas]
    # The rule refuses what does not fit before the model is loaded.
    merge_modules(first, second, everything, method, 0.5, merge_options)
    outcomes: dict[tuple[str | None, float], Evaluation] = {}
    alone = evaluator(first, task)
    for layer, alpha in progress(jobs):
        modules = everything if layer is None else layers[layer]
        merged = merge_modules(first, second, modules, method, alpha, merge_options)
        outcomes[layer, alpha] = evaluator(merged, task)

    def curve(rows: list[Evaluation]) -> Curve:
        return Curve(np.asarray(alphas), np.stack([r.correct for r in rows]), np.stack([r.nll for r in rows]))

    lines = [curve([outcomes[layer, float(a)] for a in alphas[:-1]] + [alone]) for layer in layers]
    return LayerLines(list(layers), lines, curve([outcomes[None, float(a)] for a in alphas]))


def layerwise_record(
    ends: list[AdapterWeights],
    config: RunConfig,
    task: str,
    *,
    method: str,
    points: int,
    split: str = "test",
    settings: dict | None = None,
    merge_options: dict[str, Any] | None = None,
    evaluator: AdapterEvaluator | None = None,
    progress: Callable = iter,
) -> Result:
    """All layers' lines between two adapters as a result record.

    Args:
        ends: the two adapters; the first lends the layers that stay.
        config: the run's settings: model, data, batch size, layer pattern; kept in the record.
        task, split: what is evaluated.
        method, merge_options: of `copra_llm.merge.merge`.
        points: of every line, both ends and the middle among them.
        settings: more entries for the record's config.
        evaluator: of this config and split, if there is one already.
        progress: wraps the iterable of evaluations.
    """
    started = time.time()
    evaluator = evaluator or AdapterEvaluator(config, [task], split)
    lines = layer_lines(
        *ends, evaluator, task, method=method, alphas=line(points), layer_pattern=config.schedule.layer_pattern,
        merge_options=merge_options, progress=progress,
    )  # fmt: skip
    own = {"label": config.schedule.method, "merge_method": method, "merge_options": merge_options or {},
           "split": split, "task": task, "points": points}  # fmt: skip
    evaluations = len(lines.layers) * (points - 1) + points + 1
    return Result(
        protocol="layerwise",
        config=own | (settings or {}) | config.flat(),
        metrics=lines.metrics(f"{split}/{task}") | {"evaluations": evaluations},
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        data={
            "alpha": lines.whole.alpha.tolist(),
            "layers": lines.layers,
            "accuracy": [curve.accuracy.tolist() for curve in lines.lines],
            "loss": [curve.loss.tolist() for curve in lines.lines],
            "whole_accuracy": lines.whole.accuracy.tolist(),
            "whole_loss": lines.whole.loss.tolist(),
        },
        environment=evaluator.environment(),
    )
