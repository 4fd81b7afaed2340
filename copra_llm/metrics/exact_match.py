"""Share of answers that are their reference, in percent: `copra_llm.answer_scores.exact_match`."""

import datasets
import evaluate

from copra_llm.answer_scores import exact_match


class ExactMatch(evaluate.Metric):
    """`evaluate.load("copra_llm/metrics/exact_match.py")`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Two lists of texts.", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [exact_match(*pair) for pair in zip(predictions, references, strict=True)]
        return {"exact_match": 100.0 * sum(scores) / len(scores)}
