"""Share of answers that are their reference, in percent: `copra_llm.answer_scores.exact_match`."""

from copra_llm import answer_metric
from copra_llm.answer_scores import exact_match


class ExactMatch(answer_metric.AnswerMetric):
    """`evaluate.load("copra_llm/metrics/exact_match.py")`."""

    key, score = "exact_match", staticmethod(exact_match)
