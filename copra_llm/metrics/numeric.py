"""Share of answers that end in their reference's number, in percent: `copra_llm.answer_scores.numeric`."""

import datasets
import evaluate

from copra_llm.answer_scores import numeric


class Numeric(evaluate.Metric):
    """`evaluate.load("copra_llm/metrics/numeric.py")`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Two lists of texts.", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [numeric(*pair) for pair in zip(predictions, references, strict=True)]
        return {"numeric": 100.0 * sum(scores) / len(scores)}
