"""Was what was planned so? A table of runs whose needs were predicted and measured."""

from __future__ import annotations

from collections.abc import Iterable

from copra_llm.plan.show import in_bytes
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result


def plan_table(results: Iterable[Result]) -> str:
    """Markdown: a row a run; errors are predicted minus measured, in percent of measured or in bytes.

    Memory is split where a step begins: what stays between steps, and what comes on top while it computes.
    """
    rows = []
    for r in (r for r in results if r.protocol == "plan_check"):
        for i, name in enumerate(r.config["runs"]):
            said, found = ({k.split("/", 2)[2]: v for k, v in r.metrics.items() if k.startswith(f"{name}/{side}/")}
                           for side in ("predicted", "measured"))  # fmt: skip
            same = [said[key] == found[key] for key in ("trained_parameters", "adapter_file_bytes")]
            rows.append((
                r.config["model_name_or_path"], name, f"{found['trained_parameters']:.0f}",
                "both exact" if all(same) else "no", _error(said, found, "checkpoint_bytes"),
                in_bytes(said["memory"]), in_bytes(found["memory"]), _error(said, found, "memory"),
                in_bytes(said["between_steps"] - found["between_steps"]),
                _error(_on_top(said), _on_top(found), "on_top"),
                f"{said['step_seconds']:.2f} s", f"{found['step_seconds']:.2f} s",
                "calibrated" if i == 0 else _error(said, found, "step_seconds"),
            ))  # fmt: skip
    columns = [("model",), ("run",), ("trained",), ("parameters, adapter file",), ("checkpoint",),
               ("memory: predicted",), ("measured",), ("error",), ("of it between steps",), ("on top in a step",),
               ("step: predicted",), ("measured",), ("error",)]  # fmt: skip
    return markdown_table(columns, rows)


def _on_top(figures: dict[str, float]) -> dict[str, float]:
    return {"on_top": figures["memory"] - figures["between_steps"]}


def _error(said: dict[str, float], found: dict[str, float], key: str) -> str:
    return f"{100 * (said[key] / found[key] - 1):+.1f} %"
