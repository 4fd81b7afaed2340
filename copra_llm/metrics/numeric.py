"""Share of answers that end in their reference's number, in percent: `copra_llm.answer_scores.numeric`."""

from copra_llm import answer_metric
from copra_llm.answer_scores import numeric


class Numeric(answer_metric.AnswerMetric):
    """`evaluate.load("copra_llm/metrics/numeric.py")`."""

    key, score = "numeric", staticmethod(numeric)
