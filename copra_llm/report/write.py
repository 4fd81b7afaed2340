"""Records in, one page out; beside it, where a folder is wanted, the tables and plots for a README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from copra_llm.report.curves import plot_curves
from copra_llm.report.document import Section
from copra_llm.report.groups import label_of, rank
from copra_llm.report.page import page_html
from copra_llm.report.records import find_records
from copra_llm.report.sections.landscape import plane_section
from copra_llm.report.sections.layers import layers_section
from copra_llm.report.sections.merged import connectivity_table, merged_section
from copra_llm.report.sections.overview import evaluation_section, footer, other_section, overview_section, summary
from copra_llm.report.sections.pruning import pruning_section
from copra_llm.report.sections.runs import runs_section, step_time_section, step_time_table, training_table
from copra_llm.report.sections.shapley import shapley_section
from copra_llm.report.sections.similarity import similarity_section
from copra_llm.report.sections.sweeps import schedules_section, steps_section, sweep_section
from copra_llm.report.sections.together import federated_section, multitask_section
from copra_llm.report.tables import markdown
from copra_llm.results import Result, write_atomic

SECTIONS: tuple[Callable[[Sequence[Result]], Section | None], ...] = (
    merged_section, layers_section, plane_section, pruning_section, shapley_section, multitask_section,
    federated_section, sweep_section, steps_section, schedules_section, similarity_section, runs_section,
    step_time_section, evaluation_section, other_section,
)  # fmt: skip
"""In the page's order; each is None where it has no records."""
README_TABLES = (connectivity_table, training_table, step_time_table)
"""Of `table.md`: the short forms of what the page shows at length."""
IN_README = (merged_section, runs_section, step_time_section)
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
    made = [(build, section) for build in SECTIONS if (section := build(found.results)) is not None]
    title = title or default_title(found.results)
    sections = [overview_section(found), *(section for _, section in made)]
    text = page_html(title, summary(found.results), sections, footer(found.results))
    if output.suffix == ".html" and not output.is_dir():
        write_atomic(output, text)
        return output
    curves = [r for r in found.results if r.protocol == "interpolation" and r.config["merge_method"] == "fusion"]
    if curves:
        plot_curves(curves, output / "curves")
    parts = [made_table for table in README_TABLES if (made_table := table(found.results))]
    parts += [
        f"{t.caption}\n\n{markdown(t)}" for build, section in made if build not in IN_README for t in section.tables
    ]
    write_atomic(output / "table.md", "\n".join(parts))
    write_atomic(output / "report.html", text)
    return output / "report.html"


def default_title(results: Sequence[Result]) -> str:
    """Says which methods the page is about."""
    labels = sorted({label_of(r) for r in results if "method" in r.config}, key=rank)
    if not labels or len(labels) > 4:
        return "Adapters and what can be done with them"
    named = labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
    return f"{named}: what can be done with the adapters"
