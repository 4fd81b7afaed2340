"""Mean F1 over the words of answer and reference, in percent: `copra_llm.answer_scores.token_f1`."""

from copra_llm import answer_metric
from copra_llm.answer_scores import token_f1


class TokenF1(answer_metric.AnswerMetric):
    """`evaluate.load("copra_llm/metrics/f1.py")`."""

    key, score = "f1", staticmethod(token_f1)
