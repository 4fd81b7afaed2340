"""Records in, one page out; beside it, where a folder is wanted, the tables and plots for a README."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from copra_llm.figures.groups import label_of, rank
from copra_llm.report.curves import plot_curves
from copra_llm.report.document import Section
from copra_llm.report.page import page_html
from copra_llm.report.records import Found, find_records
from copra_llm.report.sections.connectivity import connectivity_table
from copra_llm.report.sections.landscape import plane_section
from copra_llm.report.sections.layers import layers_section
from copra_llm.report.sections.merged import merged_section
from copra_llm.report.sections.overview import evaluation_section, footer, other_section, overview_section, summary
from copra_llm.report.sections.pruning import pruning_section
from copra_llm.report.sections.runs import runs_section, training_table
from copra_llm.report.sections.shapley import shapley_section
from copra_llm.report.sections.similarity import similarity_section
from copra_llm.report.sections.steps import step_section, step_table
from copra_llm.report.sections.sweeps import schedules_section, steps_section, sweep_section
from copra_llm.report.sections.together import federated_section, multitask_section
from copra_llm.report.tables import markdown
from copra_llm.results import Result, write_atomic

Build = Callable[[Sequence[Result]], Section | None]
SECTIONS: tuple[Build, ...] = (
    merged_section, layers_section, plane_section, pruning_section, shapley_section, multitask_section,
    federated_section, sweep_section, steps_section, schedules_section, similarity_section, runs_section,
    step_section, evaluation_section, other_section,
)  # fmt: skip
"""In the page's order; each is None where it has no records."""
README_TABLES = (connectivity_table, training_table, step_table)
"""Of `table.md`: the short forms of what the page shows at length."""
IN_README = (merged_section, runs_section, step_section)
"""Sections that `README_TABLES` stand for."""


def write_report(paths: Sequence[Path], output: Path, title: str | None = None) -> Path:
    """Write one self-contained page and return its path.

    Args:
        paths: result records, or folders that hold them.
        output: the page, if it ends in ".html" and is no folder. Else a folder for report.html, table.md (all tables
            in Markdown) and, where there are lines of fused adapters, curves.png and curves.svg.
        title: of the page; default: the methods in it.

    Raises:
        InputError: if there is no record, one is not whole, or a folder's plots are wanted without matplotlib.
    """
    output = Path(output)
    found = find_records(paths)
    made = report_sections(found.results)
    text = report_page(found, title, made.values())
    if output.suffix == ".html" and not output.is_dir():
        write_atomic(output, text)
        return output
    curves = [r for r in found.results if r.protocol == "interpolation" and r.config["merge_method"] == "fusion"]
    if curves:
        plot_curves(curves, output / "curves")
    parts = [in_short for table in README_TABLES if (in_short := table(found.results))]
    long = [t for build, section in made.items() if build not in IN_README for t in section.tables]
    write_atomic(output / "table.md", "\n".join(parts + [f"{t.caption}\n\n{markdown(t)}" for t in long]))
    write_atomic(output / "report.html", text)
    return output / "report.html"


def report_sections(results: Sequence[Result]) -> dict[Build, Section]:
    """The sections that have records."""
    return {build: section for build in SECTIONS if (section := build(results)) is not None}


def report_page(found: Found, title: str | None = None, sections: Iterable[Section] | None = None) -> str:
    """The page's text.

    Args:
        found: all records.
        title: of the page; default: the methods in it.
        sections: of `report_sections`, if they are made already.
    """
    results = found.results
    parts = report_sections(results).values() if sections is None else sections
    title = title or default_title(results)
    return page_html(title, summary(results), [overview_section(found), *parts], footer(results))


def default_title(results: Sequence[Result]) -> str:
    """Says which methods the page is about."""
    labels = sorted({label_of(r) for r in results if "method" in r.config}, key=rank)
    if not labels or len(labels) > 4:
        return "Adapters and what can be done with them"
    named = labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
    return f"{named}: what can be done with the adapters"
