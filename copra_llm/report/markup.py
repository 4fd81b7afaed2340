"""Markup that cannot be broken by what it holds: text is escaped unless it is markup already."""

from __future__ import annotations

import html
import re
from typing import Any

NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML forbids or UTF-8 cannot write; a JSON record may hold them."""


class Html(str):
    """Text that is markup."""


def printable(value: Any) -> str:
    """As text, with U+FFFD for what cannot be shown."""
    return NOT_TEXT.sub("\ufffd", str(value))


def escaped(value: Any) -> Html:
    """As markup; `Html` stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(printable(value)))


def joined(*children: Any) -> Html:
    """One after the other, `None` left out."""
    return Html("".join(escaped(child) for child in children if child is not None))


def el(name: str, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: of the tag.
        children: `Html`, or text that is escaped; None is left out.
        attributes: `class_` for class, `aria_label` for aria-label; None and False are left out, True is an empty one,
            a float is written with two decimals at most.
    """
    written = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    return Html(f"<{name}{written}>{joined(*children)}</{name}>")


def leaf(name: str, **attributes: Any) -> Html:
    """An SVG element without children."""
    return Html(el(name, **attributes)[: -len(f"></{name}>")] + "/>")


def number(value: float) -> str:
    """A coordinate: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def slug(*words: Any) -> str:
    """A name for ids and files: lower-case letters, digits and hyphens; never empty."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")[:80] or "x"


def _attribute(name: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return f' {name}=""'
    return f' {name}="{escaped(number(value) if isinstance(value, float) else str(value))}"'
