"""What does a causal language model answer to a prompt, word for word?

    answer = greedy decoding until the template's end of turn, the tokenizer's end of text, or max_new_tokens

Prompts of like length share a batch, padded on the left, so that all answers begin at one place; the padding is masked
and positions are the text's own, so a batch gives what each prompt gives alone. Greedy means greedy: what a model's own
generation settings say of sampling or repetition does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources

import torch
from transformers import GenerationConfig

from copra_llm.errors import InputError, nearest
from copra_llm.tasks.instruct.encode import Encoder
from copra_llm.tasks.instruct.records import Conversation, Record, Text

ANSWER_METRICS = ("exact_match", "numeric", "rouge_l", "f1")
"""Scripts in `copra_llm/metrics/`, in percent."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked."""

    input_ids: list[int]
    reference: str | None
    """What the record answers; None if it does not."""
    place: str


@dataclass(frozen=True)
class Stop:
    """What ends an answer."""

    token_ids: tuple[int, ...]
    text: str | None = None
    """Of a template whose end of turn is no token of this vocabulary."""


def question(text: str) -> Conversation:
    """A conversation in which the user asks, and nothing is answered yet."""
    return Conversation(({"role": "user", "content": text},), (), f'the prompt "{text[:40]}"')


def prompts_of(encoder: Encoder, records: Sequence[Record]) -> list[Prompt]:
    """What stands before the last answer of each record, and that answer.

    Raises:
        InputError: if there is no chat template for a conversation, it refuses one, or a text has no prompt.
    """
    return [Prompt(encoder.prompt(record), _reference(record), record.place) for record in records]


def _reference(record: Record) -> str | None:
    if isinstance(record, Text):
        return record.completion
    last = record.messages[-1]
    return last["content"] if last["role"] == "assistant" else None


def stop_of(encoder: Encoder, *, chat: bool) -> Stop:
    """End of text; with `chat`, the end of the template's turn too."""
    tokenizer = encoder.tokenizer
    ids = {tokenizer.eos_token_id}
    end = encoder.template.turn_end() if chat else ""
    if end in tokenizer.all_special_tokens or end in tokenizer.get_added_vocab():
        ids.add(tokenizer.convert_tokens_to_ids(end))
        end = ""
    return Stop(tuple(sorted(ids)), end or None)


def check_lengths(prompts: Sequence[Prompt], model, max_new_tokens: int) -> None:
    """Refuse what cannot be answered.

    Raises:
        InputError: if `max_new_tokens` is below 1, or a prompt leaves the model no room for it.
    """
    if max_new_tokens < 1:
        raise InputError(f"--max_new_tokens is {max_new_tokens}, but must be at least 1")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt in prompts:
        length = len(prompt.input_ids)
        if room is not None and length + max_new_tokens > room:
            raise InputError(f"{prompt.place}: {length} tokens and --max_new_tokens {max_new_tokens} are more than the "
                             f"model's {room}; shorten one of them")  # fmt: skip


def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    stop: Stop,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable = iter,
) -> list[str]:
    """Answers in the order of the prompts, without what ended them and white space around them.

    Args:
        model: causal, with or without an adapter; its training mode is restored.
        tokenizer: the model's.
        prompts: of `prompts_of`.
        stop: of `stop_of`.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts at once.
        progress: wraps the list of batches.

    Raises:
        InputError: as `check_lengths`.
    """
    check_lengths(prompts, model, max_new_tokens)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=max_new_tokens, pad_token_id=pad,
        eos_token_id=list(stop.token_ids), stop_strings=stop.text, use_cache=True,
    )  # fmt: skip
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].input_ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers: list[str] = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for batch in progress(batches):
            inputs = _padded([prompts[i].input_ids for i in batch], pad, model.device)
            with torch.inference_mode():
                out = model.generate(**inputs, generation_config=settings, tokenizer=tokenizer)
            for i, ids in zip(batch, out[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                answers[i] = _text(ids, tokenizer, stop)
    finally:
        model.train(was_training)
    return answers


def _padded(rows: list[list[int]], pad: int, device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)  # (batch, width)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _text(ids: list[int], tokenizer, stop: Stop) -> str:
    end = next((place for place, token in enumerate(ids) if token in stop.token_ids), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return (text.partition(stop.text)[0] if stop.text else text).strip()


def metric_path(name: str) -> str:
    """The script of one of `ANSWER_METRICS`; a path to a script of one's own is passed on.

    Raises:
        InputError: for a name that is neither.
    """
    if name.endswith(".py"):
        return name
    if name not in ANSWER_METRICS:
        raise InputError(f'there is no metric "{name}"{nearest(name, ANSWER_METRICS)}; there are '
                         f"{', '.join(ANSWER_METRICS)}, and paths of scripts")  # fmt: skip
    return str(resources.files("copra_llm.metrics").joinpath(f"{name}.py"))
