"""Who may import whom: the rows of the layout, read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "copra_llm"
ROWS = [
    ["settings", "config", "yaml_file", "paths", "schedule", "masks", "shapley", "shards", "results", "estimates"]
    + ["errors", "answer_scores", "answer_metric", "metrics", "pictures", "portable", "adapter_files", "hub"]
    + ["manifest", "locks", "json_file", "tensor_file", "patterns", "record_kinds"],
    [
        "adapter_config",
        "adapters",
        "gates",
        "gguf",
        "packaged",
        "quantised_base",
        "models",
        "tasks",
        "classifiers",
        "batches",
        "saved_runs",
        "bands",
    ]
    + ["initial", "packing", "linear_loss", "language_model", "choice_model", "conversations"]
    + ["towers", "replaced", "image_inputs", "images", "text_tower", "dual_encoder", "linear_probe"]
    + ["stochastic_depth", "compensation", "example_masks", "fused_linear", "shared_inputs", "label_tree"],
    ["merge", "prune", "quantise", "export", "build", "similarity"],
    [
        "train",
        "callback",
        "progress",
        "optimizer_file",
        "checkpoint",
        "evaluate",
        "evaluator",
        "interpolate",
        "layerwise",
        "plane",
        "variants",
    ]
    + ["optimizer", "best", "samples", "liger", "processes", "neftune", "activations", "attention", "compiled"]
    + ["exchange", "backends", "sharded", "zero", "launch"]
    + ["prefixes", "coalitions", "ledger", "generate"],
    ["figures"],
    ["protocols", "report", "summaries", "model_card", "publish", "plan"],
    ["cli"],
]
"""Modules and subpackages of `copra_llm/`; each imports from rows above and, without a cycle, from its own."""
ROW = {name: row for row, names in enumerate(ROWS) for name in names}


def units() -> dict[str, list[Path]]:
    """The package's modules and subpackages with their files."""
    found: dict[str, list[Path]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.setdefault(parts[0], []).append(file)
    return found


def imported(tree: ast.AST) -> set[str]:
    """Names right below `copra_llm` that a module imports, anywhere in it: also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by full names"
            # `from copra_llm import x` may mean a module; what is none (`__version__`) has no row.
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return {name.split(".")[1] for name in names if name.startswith("copra_llm.")}


def graph() -> dict[str, set[str]]:
    return {
        unit: set().union(*(imported(ast.parse(f.read_text(encoding="utf-8"))) for f in files)) - {unit}
        for unit, files in units().items()
    }


def test_every_module_has_its_row():
    """A new module takes its place in the table first."""
    assert set(units()) <= set(ROW), f"not in the table: {sorted(set(units()) - set(ROW))}"
    assert len(ROW) == sum(map(len, ROWS)), "a module stands in two rows"


@pytest.mark.parametrize("unit", sorted(units()))
def test_imports_go_up(unit):
    """From the module's own row or above, never from below."""
    below = {name for name in graph()[unit] if name in ROW and ROW[name] > ROW[unit]}
    assert not below, f"{unit} (row {ROW[unit]}) imports {sorted(below)} from below"


def test_no_cycles():
    """Not within a row either: the order exists."""
    assert list(TopologicalSorter(graph()).static_order())


def test_markdown_tables_are_written_in_one_place():
    """The line below a table's heading stands in `report.tables` alone, docstrings aside."""
    writing = set()
    for file in PACKAGE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        said = {ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, ast.Module | ast.FunctionDef)}
        texts = {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)} - said
        if any("---|" in text or "|---" in text for text in texts):
            writing.add(str(file.relative_to(PACKAGE)))
    assert writing == {"report/tables.py"}


def test_nothing_outside_is_imported():
    """Recipes, data and eval import the package, never the other way round."""
    for files in units().values():
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                assert not {n.split(".")[0] for n in names} & {"recipes", "data", "eval", "tests"}, file


@pytest.mark.parametrize(
    "module, absent",
    [
        ("copra_llm.schedule", ("torch", "numpy", "transformers")),
        ("copra_llm.masks", ("torch", "transformers")),
        ("copra_llm.shapley", ("torch", "transformers", "shapiq")),
        ("copra_llm.shards", ("torch", "transformers")),
        ("copra_llm.config", ("torch", "transformers")),
        ("copra_llm.results", ("torch", "numpy")),
        ("copra_llm.tasks.instruct.sources", ("torch", "numpy", "transformers", "datasets", "pyarrow")),
        ("copra_llm.tasks.instruct.check", ("torch", "transformers", "datasets", "pyarrow")),
        ("copra_llm.tasks.clip.folders", ("torch", "transformers", "datasets")),
        ("copra_llm.report", ("torch", "matplotlib")),
        ("copra_llm.cli", ("torch", "matplotlib", "transformers", "numpy")),
    ],
)
def test_importing_is_cheap(module, absent):
    """What a module does not need until it is used is not imported with it."""
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
