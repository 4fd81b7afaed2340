"""Mean ROUGE-L of answers, in percent: `copra_llm.answer_scores.rouge_l`."""

from copra_llm import answer_metric
from copra_llm.answer_scores import rouge_l


class RougeL(answer_metric.AnswerMetric):
    """`evaluate.load("copra_llm/metrics/rouge_l.py")`."""

    key, score = "rouge_l", staticmethod(rouge_l)
