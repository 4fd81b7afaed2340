"""A plan as tables to read, and as a record to compute with."""

from __future__ import annotations

from typing import Any

from copra_llm.plan.cluster import NOT_YET
from copra_llm.plan.estimate import BackendPlan, Plan
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result

PARTS = {
    "base_weights": "base weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits, temporary results",
    "buffers": "communication buffers",
    "exchange": "gradients sent, after the backward pass",
}
"""Fields of `memory.Memory` on the device -> their names."""


def tables(plan: Plan) -> str:
    """Markdown: what is so with every backend, then a column for each."""
    return f"{_facts(plan)}\n{_backends(plan)}"


def record(plan: Plan, settings: dict[str, Any]) -> Result:
    """The plan as a result record: `<quantity>` and `<backend>/<quantity>`, bytes, seconds and operations."""
    sizes = plan.sizes
    metrics: dict[str, float] = {
        "base_parameters": sizes.base_params, "trained_parameters": sizes.trained_params,
        "adapter_file_bytes": sizes.adapter_file, "checkpoint_bytes": plan.checkpoint,
        "active_share": plan.share.active, "reached_share": plan.share.reached,
        "tokens_per_step": plan.tokens_a_step, "tokens": plan.tokens_a_step * plan.steps,
    }  # fmt: skip
    for b in plan.backends:
        hidden, shown = b.step_seconds
        own = {f"memory/{name}": getattr(b.memory, name) for name in (*PARTS, "host", "total")}
        own |= {"fits": float(b.fits), "sent": b.traffic.sent(), "sent/gradients": b.traffic.sent("gradients"),
                "sent/gradients_if_all": b.gradients_if_all, "sent/weights": b.traffic.sent("weights"),
                "host_traffic": b.traffic.host, "flops": b.flops, "compute_seconds": b.compute_seconds,
                "communication_seconds": b.communication_seconds, "step_seconds_if_hidden": hidden,
                "step_seconds_if_not_hidden": shown}  # fmt: skip
        metrics |= {f"{b.backend}/{name}": value for name, value in own.items()}
    return Result("plan", settings, metrics, steps=plan.steps)


def in_bytes(value: float) -> str:
    """With three digits and its unit: 1.34 MB (a million bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}" if value else "0"
        value /= 1000
    return f"{value:.3g} TB"


def in_seconds(value: float) -> str:
    """With three digits and its unit."""
    for unit, size in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if value < size:
            return f"{value:.3g} {unit}" if value >= 0.01 or not value else f"{value * 1000:.3g} ms"
        value /= size if unit != "h" else 24.0
    return f"{value:.3g} days"


def _facts(plan: Plan) -> str:
    sizes, share = plan.sizes, plan.share
    rows = [
        ("base parameters", f"{sizes.base_params:,}"),
        ("trained parameters", f"{sizes.trained_params:,}"),
        ("adapter file", f"{sizes.adapter_file:,} bytes"),
        ("checkpoint", in_bytes(plan.checkpoint)),
        ("layers active in a step, on average", f"{100 * share.active:.1f} %"),
        ("blocks that the backward pass reaches", f"{100 * share.reached:.1f} %"),
        ("tokens a step", f"{plan.tokens_a_step:,}"),
        ("steps, tokens in all", f"{plan.steps:,}, {plan.steps * plan.tokens_a_step:,}"),
    ]
    return markdown_table([(plan.name,), ("",)], rows)


def _backends(plan: Plan) -> str:
    lines = [_column(b, plan.steps) for b in plan.backends]
    names = [name for name, _ in lines[0]]
    rows = [(name, *(dict(column)[name] for column in lines)) for name in names]
    rows = [row for row in rows if any(cell != "0" for cell in row[1:]) or row[0] in PARTS.values()]
    names = [f"{b.backend} (not in the loop yet)" if b.backend in NOT_YET else b.backend for b in plan.backends]
    return markdown_table([("a process",), *((name,) for name in names)], rows)


def _column(b: BackendPlan, steps: int) -> list[tuple[str, str]]:
    held, flow = b.memory, b.traffic
    hidden, shown = b.step_seconds
    return [
        *((label, in_bytes(getattr(held, name))) for name, label in PARTS.items()),
        ("memory", in_bytes(held.total)),
        ("fits", "yes" if b.fits else "no"),
        ("memory of the host", in_bytes(held.host)),
        ("sent a step: gradients", in_bytes(flow.sent("gradients"))),
        ("the same, inactive layers' too", in_bytes(b.gradients_if_all)),
        ("sent a step: base weights", in_bytes(flow.sent("weights"))),
        ("sent a step: trained weights", in_bytes(flow.sent("adapter"))),
        ("to and from the host a step", in_bytes(flow.host)),
        ("operations a step", f"{b.flops / 1e12:,.3g} TFLOP" if b.flops < 1e15 else f"{b.flops / 1e15:.3g} PFLOP"),
        ("computation", in_seconds(b.compute_seconds)),
        ("communication", in_seconds(b.communication_seconds)),
        ("step, communication hidden / not", f"{in_seconds(hidden)} / {in_seconds(shown)}"),
        ("run, communication hidden / not", f"{in_seconds(hidden * steps)} / {in_seconds(shown * steps)}"),
    ]
