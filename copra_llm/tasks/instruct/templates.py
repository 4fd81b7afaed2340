"""What does the model read for a conversation, and which characters of it did the assistant write?

    text  = template(messages)
    start = len(template(messages[:i], add_generation_prompt=True))      of assistant message i
    end   = len(template(messages[:i + 1]))                              without white space after the end-of-turn token

Both prefixes must be beginnings of `text`, the second up to a token that ends the whole text; a template that rewrites
earlier turns (drops their thinking, say) is refused, except for its last turn alone (`turns="last"`), which is exact.
Where the template marks the assistant's parts itself (`{% generation %}`), the marks decide. What a template would
leave out without a word is refused too.

Source: "Chat templates" in the documentation of transformers.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass

from copra_llm.errors import InputError
from copra_llm.tasks.instruct.messages import text as readable
from copra_llm.tasks.instruct.named import special_tokens, template_text
from copra_llm.tasks.instruct.records import Conversation

TURNS = ("all", "last")
"""Which assistant turns are trained."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_READS = {
    "tools": re.compile(r"\btools\b"),
    "tool_calls": re.compile(r"\btool_calls\b"),
    "reasoning_content": re.compile(r"\b(reasoning_content|thinking)\b"),
}
"""What would vanish without a word in a template that never mentions it."""


@dataclass(frozen=True)
class Rendered:
    """What the model reads, as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First and last + 1 character of each part that is trained, in order."""
    place: str


class ChatTemplate:
    """A tokenizer's chat template, or another in its place."""

    def __init__(self, tokenizer, chosen: str | None = None, turns: str = "all"):
        """Compile the template.

        Args:
            tokenizer: of transformers.
            chosen: see `template_text`.
            turns: one of `TURNS`: "all", or "last" to train the last assistant turn of a conversation alone.

        Raises:
            InputError: for a template that is missing or no Jinja.
        """
        self.source, self.turns = template_text(tokenizer, chosen), turns
        self.marked = _MARKS.search(self.source) is not None
        """Whether the template marks what the assistant wrote."""
        self._tokens = tokenizer.special_tokens_map
        self._special = special_tokens(tokenizer)
        self._special_token = re.compile("|".join(map(re.escape, self._special)) or "(?!)")
        self._parts = self._wants_parts(chosen or "the tokenizer's chat template")

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as the model reads it.

        Raises:
            InputError: if the template refuses it, has no place for something in it, or cannot be split.
        """
        self._check_everything_is_written(conversation)
        text, marks = self._write(conversation, conversation.messages)
        _check_nothing_is_left_out(conversation, text)
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        trained = [i for i in turns if i not in conversation.untrained]
        if self.turns == "last":
            trained = [i for i in trained if i == turns[-1]]
        if self.marked:
            spans = _of_turns(marks, turns, trained, conversation.place)
        else:
            spans = [self._span(conversation, i, text) for i in trained]
        spans = tuple((start, end) for start, end in spans if end > start)
        if not spans:
            raise InputError(f"{conversation.place}: the chat template leaves no text to train; remove the record")
        return Rendered(readable(text, f"{conversation.place}: the text"), spans, conversation.place)

    def prompt(self, conversation: Conversation) -> str:
        """What stands before the assistant's last turn, with the turn's beginning (`add_generation_prompt`).

        Raises:
            InputError: if the template refuses the conversation, or has no place for something in it.
        """
        self._check_everything_is_written(conversation)
        ends = conversation.messages[-1]["role"] == "assistant"
        before = conversation.messages[:-1] if ends else conversation.messages
        return self._write(conversation, before, add_generation_prompt=True)[0]

    def turn_end(self) -> str:
        """What ends an assistant's turn: the special token right after its words, else the text there; or nothing."""
        said = "copra answers"
        messages = ({"role": "user", "content": "copra asks"}, {"role": "assistant", "content": said})
        text, _ = self._write(Conversation(messages, (), "a conversation of two turns"), messages)
        after = text.rpartition(said)[2].strip()
        return next((token for token in self._special if after.startswith(token)), after)

    def _wants_parts(self, name: str) -> bool:
        """Whether the template wants contents in parts, as those of models that see do.

        Such a template writes nothing of a content that is one text, and often without a word.
        """
        from jinja2 import TemplateSyntaxError

        probe = [{"role": "user", "content": "copra asks"}, {"role": "assistant", "content": "copra answers"}]
        texts = []
        for messages in (probe, _in_parts(probe)):
            try:
                texts.append(self._render(messages)[0])
            except TemplateSyntaxError as error:
                raise InputError(
                    f"{name} is no Jinja template: {error.message}, line {error.lineno}; mend it"
                ) from None
            # Whatever else it says of this conversation, it will say of a record, with the record's place.
            except Exception:
                texts.append("")
        whole, parts = (all(message["content"] in text for message in probe) for text in texts)
        return parts and not whole

    def _check_everything_is_written(self, conversation: Conversation) -> None:
        for key, mentioned in _READS.items():
            given = conversation.tools if key == "tools" else any(m.get(key) for m in conversation.messages)
            if given and not mentioned.search(self.source):
                raise InputError(f"{conversation.place} has {key}, but the chat template never writes them; "
                                 "remove them, or give another --chat_template")  # fmt: skip

    def _span(self, conversation: Conversation, i: int, text: str) -> tuple[int, int]:
        """Of assistant message i, by the texts before and after it."""
        before, _ = self._write(conversation, conversation.messages[:i], add_generation_prompt=True)
        last = i + 1 == len(conversation.messages)
        through = text if last else self._write(conversation, conversation.messages[: i + 1])[0]
        end = self._end(text, through)
        if not text.startswith(before) or end <= len(before):
            which = f"message {i + 1}" if text.startswith(before) else f"what stands before message {i + 1}"
            way = "" if last else "give --turns last, or "
            raise InputError(
                f"{conversation.place}: the chat template writes {which} otherwise within the whole conversation, so "
                f'what is trained cannot be told; {way}give a template with "{{% generation %}}" marks'
            )
        return len(before), end

    def _end(self, text: str, through: str) -> int:
        """Where a turn ends in `text`, if the text up to its end alone is `through`; 0 if they do not agree."""
        if text.startswith(through):
            end = len(through.rstrip())
            # White space after an end-of-turn token is layout; where there is no such token, it is what ends the turn.
            return end if through[:end].endswith(self._special) else len(through)
        # Some templates end a text, not a turn, with a token of its own: they still agree up to the end of the turn.
        common = len(os.path.commonprefix([text, through]))
        ends = [match.end() for match in self._special_token.finditer(through) if match.end() <= common]
        end = ends[-1] if ends else 0
        return 0 if self._special_token.sub("", through[end:]).strip() else end

    def _write(self, conversation: Conversation, messages, **options) -> tuple[str, list[tuple[int, int]]]:
        try:
            return self._render(_in_parts(messages) if self._parts else messages, conversation.tools, **options)
        # A template is a program of its own: it raises what it likes, and what Python raises beneath it.
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f'{conversation.place}: the chat template refuses this conversation ("{said}"); change it, or give '
                "another --chat_template"
            ) from None

    def _render(self, messages, tools=(), **options) -> tuple[str, list[tuple[int, int]]]:
        """Text and marked parts."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            [list(messages)],
            tools=list(tools) or None,
            chat_template=self.source,
            return_assistant_tokens_mask=self.marked,
            **options,
            **self._tokens,
        )
        return texts[0], marks[0] if self.marked else []


def _in_parts(messages) -> list[dict]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _check_nothing_is_left_out(conversation: Conversation, text: str) -> None:
    """A template may trim a content, and drop an assistant's thinking; all else must be there."""
    for i, message in enumerate(conversation.messages, 1):
        said = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
        # What a tool answers is data, which some templates write anew.
        if message["role"] != "tool" and said.strip() not in text:
            raise InputError(
                f"{conversation.place}: the chat template leaves out or rewrites message {i}, the {message['role']}'s; "
                "remove it, or give another --chat_template"
            )


def _of_turns(marks: list[tuple[int, int]], turns: list[int], trained: list[int], place: str) -> list[tuple[int, int]]:
    """The marked parts that belong to the trained turns."""
    if trained == turns:
        return marks
    if len(marks) != len(turns):
        raise InputError(
            f"{place}: the chat template marks {len(marks)} parts as the assistant's for {len(turns)} turns, so those "
            "not to be trained cannot be left out; give another --chat_template"
        )
    return [mark for mark, turn in zip(marks, turns, strict=True) if turn in trained]
