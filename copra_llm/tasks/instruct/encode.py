"""Which tokens does the model read, and which of them are trained?

The whole text is tokenised at once, as it will be at inference, and a token is trained if it holds a character of a
trained part. Where a token spans a boundary (a header's last line break and the answer's first are one token in many
vocabularies), it is therefore trained: leaving it out could leave out the whole of a one-word answer.

Chat templates write their own beginning-of-text token, or none: none is added. Text without a template gets one if
the tokenizer adds it by itself, and the end-of-text token, trained, at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.named import begins_with_bos
from copra_llm.tasks.instruct.records import Broken, Record, Text
from copra_llm.tasks.instruct.templates import TURNS, ChatTemplate, Rendered

BATCH = 512
"""Records that go through the tokenizer at a time."""


@dataclass(frozen=True)
class Encoded:
    """One training example of n tokens."""

    input_ids: np.ndarray
    """`(n,)` int32."""
    trained: np.ndarray
    """`(n,)` bool: whether the token is a target of the loss."""
    place: str
    """File and line of the record."""

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Tokenises records for one tokenizer and chat template."""

    def __init__(self, tokenizer, chat_template: str | None = None, turns: str = "all"):
        """Prepare the tokenizer.

        Args:
            tokenizer: of transformers, a fast one.
            chat_template: "chatml", "plain", "alpaca" or a file; None: the tokenizer's own.
            turns: "all" assistant turns are trained, or the "last" alone.

        Raises:
            InputError: for a slow tokenizer, one without an end-of-text token, or another value of `turns`.
        """
        if turns not in TURNS:
            raise InputError(f'--turns is "{turns}", but must be {" or ".join(TURNS)}')
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("the tokenizer is a slow one, which does not say where its tokens stand in the text; "
                             "give a model with a tokenizer.json")  # fmt: skip
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token); give a model whose tokenizer has one")
        self.tokenizer = tokenizer
        self._chat = (chat_template, turns)
        self._tokens = _untrimmed(tokenizer)
        self._bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        self._eos = tokenizer.eos_token_id
        if chat_template is not None:
            _ = self.template  # so that a file that is missing is reported before anything is read

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template: looked for when a conversation needs it, since text does without."""
        return ChatTemplate(self.tokenizer, *self._chat)

    def encode(self, record: Record) -> Encoded:
        """Tokenise one record.

        Raises:
            InputError: if there is no chat template for a conversation, or it refuses this one.
        """
        return self._tokenise([record], [self._render(record)])[0]

    def prompt(self, record: Record) -> list[int]:
        """Token ids of what stands before the assistant's last turn, as in training.

        Raises:
            InputError: if there is no chat template for a conversation, it refuses this one, or nothing stands there.
        """
        text = record.prompt if isinstance(record, Text) else self.template.prompt(record)
        ids = self._tokens.encode(text, add_special_tokens=False).ids
        if isinstance(record, Text) and ids[:1] != self._bos:
            ids = [*self._bos, *ids]
        if not ids:
            raise InputError(f"{record.place} is text without a prompt; give prompt and completion, or a conversation")
        return ids

    def stream(self, records: Iterable[Record | Broken]) -> Iterator[Encoded | Broken]:
        """Tokenise records in batches, in order; what the chat template refuses becomes `Broken`.

        Raises:
            InputError: if there is no chat template for a conversation.
        """
        records = iter(records)
        while batch := list(islice(records, BATCH)):
            rendered = [self._render_or_say(record) for record in batch]
            good = [i for i, text in enumerate(rendered) if not isinstance(text, Broken)]
            encoded = self._tokenise([batch[i] for i in good], [rendered[i] for i in good])
            for i, example in zip(good, encoded, strict=True):
                rendered[i] = example
            yield from rendered

    def _render_or_say(self, record: Record | Broken) -> Rendered | Broken:
        if isinstance(record, Broken):
            return record
        if not isinstance(record, Text):
            _ = self.template  # not to be taken for a fault of the record
        try:
            return self._render(record)
        except InputError as error:
            return Broken(record.place, str(error))

    def _render(self, record: Record) -> Rendered:
        if not isinstance(record, Text):
            return self.template.render(record)
        text = record.prompt + record.completion
        return Rendered(text, ((len(record.prompt), len(text)),), record.place)

    def _tokenise(self, records: list[Record], rendered: list[Rendered]) -> list[Encoded]:
        tokens = self._tokens.encode_batch([r.text for r in rendered], add_special_tokens=False)
        return [
            self._example(*parts, isinstance(record, Text))
            for record, *parts in zip(records, rendered, tokens, strict=True)
        ]

    def _example(self, rendered: Rendered, tokens, ends: bool) -> Encoded:
        ids = tokens.ids
        trained = _covered(tokens.offsets, rendered.spans)
        if ends:
            before = self._bos if ids[:1] != self._bos else []
            after = [self._eos] if ids[-1:] != [self._eos] else []
            ids = [*before, *ids, *after]
            trained = np.concatenate([np.zeros(len(before), bool), trained, np.ones(len(after), bool)])
        return Encoded(np.array(ids, np.int32), trained, rendered.place)


def _covered(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which tokens hold a character of a span `(n,)`; offsets and spans count characters."""
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T  # (n,) each
    covered = np.zeros(len(starts), bool)
    for first, last in spans:
        covered |= (ends > first) & (starts < last)
    return covered


def _untrimmed(tokenizer):
    """The tokenizer's core, without what it does after the tokens are found.

    That adds special tokens, which chat templates write themselves, and may take spaces off the offsets, so that a
    token of spaces would belong to no part of the text.
    """
    from tokenizers import Tokenizer

    core = tokenizer.backend_tokenizer
    copy = Tokenizer.from_str(core.to_str())
    copy.post_processor = None
    copy.encode_special_tokens = core.encode_special_tokens
    copy.no_truncation()
    copy.no_padding()
    return copy
