"""One table, three forms: HTML to read, CSV with every digit to compute with, Markdown for a README."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from copra_llm.estimates import Estimate
from copra_llm.report.markup import Html, el, escaped, printable, slug

Value = str | int | float | Estimate | None
"""What a cell holds; None is shown as a dash."""
GROUP_COLUMNS = (("model",), ("task",), ("method",), ("learning rate", "g"), ("steps", "d"), ("other settings",))
"""Of `Group.heads`."""
MOST_CELLS = 4000
"""Of a table on the page; a larger one is shown in part, and whole in its CSV."""


@dataclass(frozen=True)
class Column:
    """A heading and how its numbers are shown."""

    name: str
    spec: str | None = None
    """Format of a number or estimate, e.g. ".1f"; None: text."""


@dataclass(frozen=True)
class Table:
    """Rows of values below headings."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    heads: int = 1
    """How many columns, from the first on, name the row."""
    note: str = ""

    @property
    def file(self) -> str:
        """Name of its CSV file."""
        return f"{slug(self.caption)}.csv"

    def text(self, column: int, value: Value) -> str:
        """A value as it is shown."""
        if value is None:
            return "–"
        if isinstance(value, str):
            return printable(value)
        return format(value, self.columns[column].spec or "")


def table(caption: str, columns: Sequence[tuple], rows: Sequence[Sequence[Value]], heads: int = 1, note="") -> Table:
    """A table from `(name,)` or `(name, spec)` columns; a column without any value is left out."""
    keep = [i for i in range(len(columns)) if i < heads or any(row[i] not in (None, "") for row in rows)]
    kept = [[row[i] for i in keep] for row in rows]
    return Table(caption, [Column(*columns[i]) for i in keep], kept, sum(i < heads for i in keep), note)


def markdown(t: Table) -> str:
    """With a heading and a line for each row; a bar in a name is escaped."""
    head, *body = ([c.name for c in t.columns], *([t.text(i, v) for i, v in enumerate(row)] for row in t.rows))
    return "\n".join([_line(head), f"|{'---|' * len(head)}", *map(_line, body)]) + "\n"


def markdown_table(columns: Sequence[tuple], rows: Sequence[Sequence[Value]]) -> str:
    """Markdown of rows below all of the `(name,)` or `(name, spec)` columns; "" where there is no row."""
    return markdown(Table("", [Column(*column) for column in columns], rows)) if rows else ""


def _line(cells: Sequence[str]) -> str:
    texts = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "|" + "".join(f" {text} |" if text else " |" for text in texts)


def csv_text(t: Table) -> str:
    """Every digit; an estimate takes three columns: its mean, low and high end."""
    wide = [any(isinstance(row[i], Estimate) for row in t.rows) for i in range(len(t.columns))]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    heading: list[str] = []
    for column, is_wide in zip(t.columns, wide, strict=True):
        heading += [column.name, f"{column.name}, low", f"{column.name}, high"] if is_wide else [column.name]
    writer.writerow([_csv_cell(name) for name in heading])
    for row in t.rows:
        cells: list[Value] = []
        for value, is_wide in zip(row, wide, strict=True):
            if not is_wide:
                cells.append(value)
            elif isinstance(value, Estimate):
                cells += [value.mean, *((value.low, value.high) if value.has_interval else (None, None))]
            else:
                cells += [value, None, None]
        writer.writerow([_csv_cell(value) for value in cells])
    return lines.getvalue()


def csv_link(t: Table) -> Html:
    """A link that saves the CSV; it holds the file, so it works without network and script."""
    data = "data:text/csv;charset=utf-8," + quote(csv_text(t), safe=",;:/.+-_()[]=*!@$")
    rows = f"{len(t.rows)} row{'s' if len(t.rows) != 1 else ''}"
    label = f"Download CSV: {t.caption}"
    return el("a", f"CSV, {rows}", class_="csv", href=data, download=t.file, aria_label=f"{label}, {rows}")


def html_table(t: Table, name: str) -> Html:
    """The table in a region that scrolls by keyboard, with its caption and its CSV link; `name` is its id."""
    most = max(MOST_CELLS // max(len(t.columns), 1), 1)
    body = [
        el("tr", *(_html_cell(t, i, value) for i, value in enumerate(row)))
        for row in t.rows[: most if len(t.rows) > most else None]
    ]
    head = el("tr", *(el("th", c.name, scope="col", class_="n" if c.spec else None) for c in t.columns))
    cut = f" The first {most} of {len(t.rows)} rows; the CSV has all." if len(t.rows) > most else ""
    note = el("p", t.note + cut, class_="note") if t.note or cut else None
    grid = el("table", el("caption", t.caption, id=name), el("thead", head), el("tbody", *body))
    region = el("div", grid, class_="scroll", role="group", aria_labelledby=name, tabindex="0")
    return el("div", region, note, el("p", csv_link(t), class_="links"), class_="table")


def _html_cell(t: Table, i: int, value: Value) -> Html:
    text = escaped(t.text(i, value))
    if isinstance(value, Estimate) and value.has_interval:
        mean, interval = t.text(i, value).split(" ", 1)
        text = Html(f"{escaped(mean)} {el('span', interval, class_='ci')}")
    if i < t.heads:
        return el("th", text, scope="row")
    return el("td", text, class_="n" if t.columns[i].spec else None)


def _csv_cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(float(value))
    text = printable(value)
    # A spreadsheet would run a text that begins like a formula.
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and isinstance(value, str) else text
