"""Chat templates of the shapes that published models have, written for the tests, and tokenizers that know their marks.

Each template comes with what an assistant's content becomes in it: the text that has to be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from copra_llm.models import load_tokenizer

MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|bos|>", "<start_of_turn>", "<end_of_turn>",
         "[INST]", "[/INST]"]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A template and what it does."""

    source: str
    trained: Callable[[str], str]
    """Content of an assistant message -> the text that is trained."""
    system: bool = True
    """Whether it takes a system message."""
    parts: bool = False
    """Whether it wants contents in parts."""


LLAMA3 = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<|bos|>' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<|bos|>' }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Drops the thinking of earlier turns, as Qwen3's does."""
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['function'] | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""No end-of-turn token: a turn ends with an empty line. The header's last space is part of the answer's first token."""
IN_PARTS = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|eot_id|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Of a model that sees: a content that is one text would vanish."""
LAST_END = (
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{{ '<start_of_turn>assistant\n' if add_generation_prompt else eos_token }}"
)
"""Ends the whole text with a token of its own, as Phi 3's does."""

SHAPES = {
    "smollm2": Shape("", lambda said: said + "<|im_end|>"),
    "llama3": Shape(LLAMA3, lambda said: said.strip() + "<|eot_id|>"),
    "mistral": Shape(MISTRAL, lambda said: " " + said + "<|im_end|>", system=False),
    "gemma": Shape(GEMMA, lambda said: said.strip() + "<end_of_turn>", system=False),
    "chatml": Shape(CHATML, lambda said: said + "<|im_end|>"),
    "parts": Shape(IN_PARTS, lambda said: " " + said + "<|eot_id|>", parts=True),
    "tools": Shape(TOOLS, lambda said: said + "<|im_end|>"),
}
"""By what they are like; smollm2 is the model's own, which the tokenizer brings along."""


def smollm2_tokenizer():
    """SmolLM2's, with the marks of the other templates as special tokens."""
    tokenizer = load_tokenizer("smollm2")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)
    return tokenizer


def bos_tokenizer():
    """SmolLM2's, made to begin every text with `<|bos|>`, as Llama's does."""
    tokenizer = smollm2_tokenizer()
    tokenizer.bos_token = "<|bos|>"
    bos = ("<|bos|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[bos]
    )
    return tokenizer


def sentencepiece_tokenizer():
    """Small, of Llama 2's build: words begin with ▁, unknown characters become bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the user asks and the assistant answers the user", "what is the answer"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
