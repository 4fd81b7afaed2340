"""How close is a written answer to the reference?

    exact match : normalised answer == normalised reference
    token F1    : 2PR / (P + R), P and R the shares of answer and reference tokens that the other has, with multiplicity
    ROUGE-L     : 2PR / (P + R), P = LCS / answer tokens, R = LCS / reference tokens, LCS the longest common subsequence
    numeric     : last number of the answer == last number of the reference; what follows "####" counts first

Each is a pure function of two texts, in [0, 1].

Source: SQuAD (arXiv 1606.05250) for normalisation, exact match and F1; Lin, ROUGE (W04-1013), section 3, with beta = 1;
GSM8K (arXiv 2110.14168) for "####".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[^\W_]+")
# A minus is a sign only where no operand stands before it, and commas stand between groups of three.
_NUMBER = re.compile(r"((?<![\w.)\]])[-−])?[$€£]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def normalised(text: str) -> str:
    """Small letters, without punctuation and English articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    return float(normalised(answer) == normalised(reference))


def token_f1(answer: str, reference: str) -> float:
    """On normalised words; 1 if both have none."""
    said, wanted = normalised(answer).split(), normalised(reference).split()
    if not said and not wanted:
        return 1.0
    return _f1((Counter(said) & Counter(wanted)).total(), len(said), len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """On words in small letters, unstemmed; 0 if either has none."""
    said, wanted = (_WORDS.findall(text.lower()) for text in (answer, reference))
    return _f1(longest_common_subsequence(said, wanted), len(said), len(wanted))


def longest_common_subsequence(a: Sequence, b: Sequence) -> int:
    """Its length; time len(a) * len(b), memory len(b)."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def numeric(answer: str, reference: str) -> float:
    """Raises ValueError if the reference has no number; an answer without one is wrong."""
    wanted = last_number(reference)
    if wanted is None:
        raise ValueError(f'the reference "{reference[:80]}" has no number')
    return float(last_number(answer) == wanted)


def last_number(text: str) -> Decimal | None:
    """The first number after the last "####", else the last one of the text; None if there is none.

    Currency signs, thousands' commas and units are passed over: "-$1,234.50 a day" is -1234.5.
    """
    before, mark, after = text.rpartition("####")
    found = _NUMBER.findall(after)
    if mark and found:
        found = found[:1]
    elif mark:
        found = _NUMBER.findall(before)
    if not found:
        return None
    sign, number = found[-1]
    return (-1 if sign else 1) * Decimal(number.replace(",", ""))


def _f1(common: int, said: int, wanted: int) -> float:
    return 2.0 * common / (said + wanted) if common else 0.0
