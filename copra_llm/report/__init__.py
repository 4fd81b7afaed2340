"""What do the result records say? Tables, plots and one HTML page, all made from the records alone.

    records.py    which records there are          ../figures    records -> numbers with intervals
    sections/     numbers -> figures and tables    document.py   figures and tables -> markup
    plots/        numbers -> SVG                   tables.py     one table as HTML, CSV, Markdown
    page.py       the whole page                   write.py      records in, page out

Every mean has its 95 % interval over seeds (`copra_llm.estimates`) or pairs of seeds (`copra_llm.bands`).
"""

from copra_llm.report.curves import plot_curves, require_matplotlib
from copra_llm.report.records import find_results
from copra_llm.report.sections.connectivity import connectivity_table
from copra_llm.report.sections.runs import training_table
from copra_llm.report.sections.steps import step_table
from copra_llm.report.write import write_report

__all__ = [
    "connectivity_table", "find_results", "plot_curves", "require_matplotlib", "step_table", "training_table",
    "write_report",
]  # fmt: skip
