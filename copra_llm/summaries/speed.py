"""How much faster are merges and coalitions, how much closer the Shapley estimates? Tables of the benchmarks' records.

Ratios of merges and coalitions are of CPU seconds in one run: the other's divided by this package's. Ratios of
estimates are of errors: this package's divided by the other's.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from copra_llm.results import Result


def merging_table(results: Iterable[Result]) -> str:
    """Markdown: seconds and ratios of the merge at a 7B model's shapes against PEFT, then seconds of every rule."""
    records = [r for r in results if r.protocol == "speed_merge"]
    return "\n".join(_against_peft(r) + "\n" + _every_rule(r) for r in records)


def estimators_table(results: Iterable[Result]) -> str:
    """Markdown: errors of the default estimator and of `adjusted` against the best of shapiq's, by game and budget."""
    head = ["game", "evaluations", "`quadrature`", "`adjusted`", "best of shapiq's four", "ratio", "ratio, equal time",
            "best of shapiq's eight", "ratio", "calibration"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in (r for r in results if r.protocol == "speed_shapley"):
        for game, cells in r.data["games"].items():
            for budget in sorted({c["budget"] for c in cells}):
                lines.append(_estimators_row(game, budget, cells, r.config))
    return "\n".join(lines) + "\n"


def coalitions_table(results: Iterable[Result]) -> str:
    """Markdown: what coalitions cost that share hidden states, against one evaluation each."""
    lines = ["| model | coalitions | way | plain / this, CPU seconds | blocks: plain / this | values differ by |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    records = [r for r in results if r.protocol == "speed_coalitions"]
    for r in records:
        for key, ratio in ((k, v) for k, v in r.metrics.items() if k.startswith("ratio/")):
            name = key.removeprefix("ratio/")
            model, coalitions, way = name.split("/")
            low, high, apart = (
                r.metrics[f"{what}/{name}"] for what in ("ratio_min", "ratio_max", "largest_difference")
            )
            blocks = r.metrics[f"blocks/{model}/{coalitions}/plain"] / r.metrics[f"blocks/{name}"]
            said = f"at most {apart:.0e} nats" if apart else "nothing"
            lines.append(
                f"| {model} | {coalitions} | {way} | {ratio:.2f} [{low:.2f}, {high:.2f}] | {blocks:.2f} | {said} |"
            )
    return "\n".join(lines) + "\n" if records else ""


def _estimators_row(game: str, budget: int, cells: list[dict], config: dict) -> str:
    found = {(c["estimator"], c["setting"]): c for c in cells if c["budget"] == budget}

    def best(names: list[str], setting: str) -> dict:
        return min((found[name, setting] for name in names), key=itemgetter("error"))

    own, other = (found[name, "evaluations"] for name in config["ours"])
    four, eight = (best(names, "evaluations") for names in (config["named"], config["named"] + config["further"]))
    timed = best(config["named"], "time")
    columns = [
        game, f"{budget}", _percent(own), _percent(other), f"{_percent(four)} ({four['estimator']})",
        _error_ratio(own, four), _error_ratio(own, timed), f"{_percent(eight)} ({eight['estimator']})",
        _error_ratio(own, eight), f"{own['calibration']:.1f}, {other['calibration']:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(columns) + " |"


def _percent(cell: dict) -> str:
    return f"{cell['error']:.2g} %" if cell["error"] < 99.5 else f"{cell['error']:.0f} %"


def _error_ratio(ours: dict, theirs: dict) -> str:
    exact = 1e-6  # percent: rounding
    if theirs["error"] < exact:
        return "both exact" if ours["error"] < exact else "rival exact"
    ratio = ours["error"] / theirs["error"]
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _against_peft(r: Result) -> str:
    m, config = r.metrics, r.config
    lines = ["| merged and cut to its rank | this package | PEFT | ratio |", "|---|---|---|---|"]
    square = f"{config['hidden']} × {config['hidden']}"
    tall = f"{config['mlp']} × {config['hidden']}"
    rows = [(f"one module, {square}", "square", "svd"), (f"one module, {tall}", "tall", "svd"),
            (f"one module, {tall}, PEFT thin", "tall", "svd thin")]  # fmt: skip
    for what, kind, label in rows:
        ours, theirs = m[f"cpu_seconds/{kind}/truncated"], m[f"cpu_seconds/{kind}/PEFT {label}"]
        lines.append(f"| {what} | {_seconds(ours)} | {_seconds(theirs)} | {m[f'cpu_ratio/{kind}, {label}']:.0f} |")
    for label in ("svd", "svd thin"):
        theirs = m[f"cpu_seconds/whole, PEFT {label}, extrapolated"]
        what = f"all {7 * config['layers']} modules{', PEFT thin' if label == 'svd thin' else ''}"
        ours, ratio = m["cpu_seconds/whole/truncated"], m[f"cpu_ratio/whole, {label}"]
        lines.append(f"| {what} | {_seconds(ours)} | {_seconds(theirs)} (extrapolated) | {ratio:.0f} |")
    ours, theirs = m["cpu_seconds/square/ties on delta"], m["cpu_seconds/square/PEFT ties_svd"]
    ratio = m["cpu_ratio/square, ties on delta"]
    lines.append(f"| `ties --on delta`, one module, {square} | {_seconds(ours)} | {_seconds(theirs)} | {ratio:.1f} |")
    far = max(value for name, value in m.items() if name.startswith("distance_to_PEFT/"))
    memory = m["peak_gib/whole, this package"]
    note = f"Peak memory of the whole merge, adapters included: {memory:.1f} GiB. The results differ from PEFT's by at "
    return "\n".join(lines) + f"\n\n{note}most {far:.1g} of their norm: PEFT's SVD is in float32.\n"


def _every_rule(r: Result) -> str:
    head = "one layer (7 modules), by rule, seconds"
    named = [(name.removeprefix("cpu_seconds/layer/"), value) for name, value in r.metrics.items() if "/layer/" in name]
    return f"| {head} | |\n|---|---|\n" + "".join(f"| `{name}` | {value:.2f} |\n" for name, value in named)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 3600 else f"{value / 3600:.1f} h"
