"""Mean ROUGE-L of answers, in percent: `copra_llm.answer_scores.rouge_l`."""

import datasets
import evaluate

from copra_llm.answer_scores import rouge_l


class RougeL(evaluate.Metric):
    """`evaluate.load("copra_llm/metrics/rouge_l.py")`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Two lists of texts.", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [rouge_l(*pair) for pair in zip(predictions, references, strict=True)]
        return {"rouge_l": 100.0 * sum(scores) / len(scores)}
