"""Is nothing cut, dropped or shown otherwise than said?"""

from __future__ import annotations

import io

import numpy as np
import pytest
from instruct_templates import smollm2_tokenizer

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.encode import Encoded, Encoder
from copra_llm.tasks.instruct.lengths import Counts, counted, fit
from copra_llm.tasks.instruct.preview import GREEN, RESET, has_colours, preview
from copra_llm.tasks.instruct.records import Broken, Text


def example(trained: str) -> Encoded:
    """`trained`: a digit a token, 1 where it is trained."""
    return Encoded(np.arange(len(trained), dtype=np.int32), np.array([c == "1" for c in trained]), trained)


def lengths(*examples, **settings) -> tuple[list, Counts]:
    counts = Counts()
    return list(fit(examples, counts, **settings)), counts


# --- lengths ----------------------------------------------------------------------------------------------


def test_cut_keeps_the_beginning_and_drops_what_has_nothing_left_to_train():
    kept, counts = lengths(example("0011"), example("00111"), example("000011"), max_length=4)
    assert [e.place for e in kept] == ["0011", "00111"]
    assert kept[1].input_ids.tolist() == [0, 1, 2, 3] and kept[1].trained.tolist() == [False, False, True, True]
    assert (counts.kept, counts.cut, counts.dropped) == (2, 1, 1)


def test_drop_takes_what_fits_as_it_is():
    kept, counts = lengths(example("0011"), example("00111"), max_length=4, too_long="drop")
    assert [len(e) for e in kept] == [4] and (counts.kept, counts.cut, counts.dropped) == (1, 0, 1)


def test_without_a_limit_everything_is_kept():
    kept, counts = lengths(example("01" * 5000))
    assert len(kept[0]) == 10_000 and (counts.kept, counts.cut, counts.dropped) == (1, 0, 0)


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_every_record_is_accounted_for(too_long):
    """read = kept + dropped + broken, whatever comes; broken ones are passed on; equal ones counted and kept."""
    tokenizer = smollm2_tokenizer()
    records = [Text("", "word " * n, f"line {n}") for n in (1, 1, 5, 9, 5, 5)]
    records.insert(2, Broken("line 0", "line 0 is not JSON"))
    counts = Counts()
    passed = list(fit(Encoder(tokenizer).stream(counted(records, counts)), counts, max_length=6, too_long=too_long))
    assert counts.read == 7 == counts.kept + counts.dropped + counts.broken
    assert counts.duplicates == 3 and counts.broken == 1 and records[2] in passed
    assert len(passed) == counts.kept + counts.broken
    assert all(len(e) <= 6 for e in passed if isinstance(e, Encoded))
    assert str(counts) == (
        f"7 read, {counts.kept} kept ({counts.cut} of them cut), {counts.dropped} dropped, 1 broken, "
        "3 equal to an earlier one"
    )


@pytest.mark.parametrize(
    "settings, said",
    [({"max_length": 0}, "--max_length is 0, but must be at least 1"), ({"too_long": "wrap"}, "must be cut or drop")],
)
def test_limits_that_are_none(settings, said):
    """Before the first example is asked for."""
    with pytest.raises(InputError, match=said):
        fit([], Counts(), **settings)


# --- preview ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


def test_a_preview_shows_what_is_trained(tokenizer):
    examples = [Encoder(tokenizer).encode(Text("1 + 2 =", " 3", f"f, line {i}")) for i in (1, 2, 3)]
    text = preview(examples, tokenizer, 2)
    head = "--- f, line {}: {} of {} tokens are trained\n"
    trained, length = int(examples[0].trained.sum()), len(examples[0])
    shown = "1 + 2 =[[ 3<|im_end|>]]\n"
    assert text == head.format(1, trained, length) + shown + "\n" + head.format(2, trained, length) + shown
    assert f"1 + 2 ={GREEN} 3<|im_end|>{RESET}" in preview(examples, tokenizer, 1, colours=True)


def test_a_text_cannot_steer_the_terminal(tokenizer):
    """Its own escape sequences are written out; line breaks and tabs are shown."""
    text = preview([Encoder(tokenizer).encode(Text("\x1b[2Ja\n\tb ", "c\r", "f"))], tokenizer, 1, colours=True)
    assert "\\x1b[2Ja\n\tb" in text and "c\\r" in text and "\x1b[2J" not in text


def test_colours_are_for_terminals(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert has_colours(Terminal()) and not has_colours(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Terminal())
