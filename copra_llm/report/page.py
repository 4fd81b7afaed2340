"""The page: one file that needs nothing else, neither network nor script.

A content security policy holds the page to that: it loads nothing, and runs and styles by what is named in it by
its hash alone, so that no name in a record can become code.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Sequence
from importlib import resources

from copra_llm.report.document import Section, section_html
from copra_llm.report.markup import Html, el, joined
from copra_llm.report.palette import theme_css


def page_html(title: str, lead: str, sections: Sequence[Section], footer: str) -> Html:
    """The whole document.

    Args:
        title: of the page.
        lead: what it holds, in a sentence or two.
        sections: in their order.
        footer: where it all comes from.
    """
    style, script = stylesheet(), _package_text("page.js")
    ids = map(str, itertools.count(1))
    made = [(section.title, *section_html(section, ids)) for section in sections]
    contents = el(
        "nav",
        el("h2", "Contents", id="contents"),
        el("ul", *(el("li", el("a", name, href=f"#{anchor}")) for name, anchor, _ in made)),
        aria_labelledby="contents",
    )
    head = joined(
        Html('<meta charset="utf-8"/>'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}"/>'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
        Html('<meta name="color-scheme" content="light dark"/><meta name="referrer" content="no-referrer"/>'),
        el("title", title),
        el("style", Html(style)),
    )
    body = joined(
        el("a", "Skip to the results", href="#results", class_="skip"),
        el(
            "div",
            el("header", el("h1", title), el("p", lead, class_="lead")),
            contents,
            el("main", *(section for _, _, section in made), id="results", tabindex="-1"),
            el("footer", el("p", footer)),
            class_="shell",
        ),
        el("script", Html(script)),
    )
    return Html(f'<!doctype html>\n<html lang="en">{el("head", head)}{el("body", body)}</html>\n')


def stylesheet() -> str:
    """The page's rules with the colours of both themes; print is light."""
    dark = f"@media screen and (prefers-color-scheme:dark){{{theme_css('dark')}}}"
    return f"{theme_css('light')}{dark}\n{_package_text('page.css')}"


def _package_text(name: str) -> str:
    return resources.files("copra_llm.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    def named(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {named(style)}; script-src {named(script)}; base-uri 'none'"
