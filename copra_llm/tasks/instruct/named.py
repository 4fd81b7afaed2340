"""Which chat template does a conversation go through, and which tokens of the tokenizer are no ordinary text?

The tokenizer's own; another from a file; or, for a model that has none, one of three by name. None is taken unasked:
a model learns the one that it is trained with.
"""

from __future__ import annotations

from pathlib import Path

from copra_llm.errors import InputError, nearest

NAMED = {
    # Every turn between the ChatML marks; a model without these tokens reads them as ordinary text.
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Role names as words; every turn but the first begins on a new line; the model's own end of text ends an answer.
    "plain": "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}[message['role']] + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    # Stanford Alpaca's headings; its first paragraph is the system message, where there is one.
    "alpaca": "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'tool' %}{{ raise_exception('this template has no tool messages') }}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
}
"""Templates to be asked for by name. All mark what the assistant wrote."""


def template_text(tokenizer, chosen: str | None) -> str:
    """The Jinja source of a chat template.

    Args:
        tokenizer: of transformers.
        chosen: a name of `NAMED`, or a file; None: the tokenizer's own.

    Raises:
        InputError: if the tokenizer has none, or the name means nothing.
    """
    if chosen is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                f"the tokenizer has no chat template; give --chat_template {', '.join(NAMED)} or a file with one"
            ) from None
    if chosen in NAMED:
        # As the tokenizer would begin a text; inference adds nothing to what a template has written.
        return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + NAMED[chosen]
    if not Path(chosen).is_file():
        raise InputError(
            f'--chat_template "{chosen}" is no file and none of {", ".join(NAMED)}{nearest(chosen, NAMED)}'
        )
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{chosen} is not UTF-8 text (byte {error.start + 1}); give a Jinja template") from None


def begins_with_bos(tokenizer) -> bool:
    """Whether the tokenizer itself puts its beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def special_tokens(tokenizer) -> tuple[str, ...]:
    """The texts that the tokenizer takes for one special token each, longest first."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True))
