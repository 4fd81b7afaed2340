"""A mean score of answers as a metric of the `evaluate` library: what the scripts in `metrics/` share.

`evaluate.load` takes the first metric class that it finds in a script, so scripts import this module, not its class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import datasets
import evaluate


class AnswerMetric(evaluate.Metric):
    """The mean of a score over pairs of answer and reference, in percent."""

    key: str
    """Of the result."""
    score: Callable[[str, str], float]
    """Of `copra_llm.answer_scores`, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=inspect.getmodule(type(self)).__doc__,
            citation="",
            inputs_description="Two lists of texts.",
            features=features,
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [self.score(*pair) for pair in zip(predictions, references, strict=True)]
        return {self.key: 100.0 * sum(scores) / len(scores)}
