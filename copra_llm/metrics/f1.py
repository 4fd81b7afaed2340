"""Mean F1 over the words of answer and reference, in percent: `copra_llm.answer_scores.token_f1`."""

import datasets
import evaluate

from copra_llm.answer_scores import token_f1


class TokenF1(evaluate.Metric):
    """`evaluate.load("copra_llm/metrics/f1.py")`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description="Two lists of texts.", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        scores = [token_f1(*pair) for pair in zip(predictions, references, strict=True)]
        return {"f1": 100.0 * sum(scores) / len(scores)}
