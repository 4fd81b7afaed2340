"""How fast are steps, merges, evaluations, coalitions, how close the Shapley estimates? Tables of the records.

Ratios of merges, evaluations and coalitions are of CPU seconds in one run: the other's divided by this package's.
Ratios of estimates are of errors: this package's divided by the other's.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from copra_llm.estimates import Estimate
from copra_llm.figures.steps import (
    COMPILED_GOALS,
    COMPILED_PAIRS,
    CONTENDERS,
    EVALUATION_GOAL,
    GOALS,
    JUDGED,
    PROFILED,
    device_of,
    ratio_of,
    step_records,
    verdict,
)
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result


def merging_table(results: Iterable[Result]) -> str:
    """Markdown: seconds and ratios of the merge at a 7B model's shapes against PEFT, then seconds of every rule."""
    records = [r for r in results if r.protocol == "speed_merge"]
    return "\n".join(_against_peft(r) + "\n" + _every_rule(r) for r in records)


def estimators_table(results: Iterable[Result]) -> str:
    """Markdown: errors of the default estimator and of `adjusted` against the best of shapiq's, by game and budget."""
    rows = [
        (game, budget, *_estimators_cells(budget, cells, r.config))
        for r in results
        if r.protocol == "speed_shapley"
        for game, cells in r.data["games"].items()
        for budget in sorted({c["budget"] for c in cells})
    ]
    columns = [
        ("game",), ("evaluations",), ("`quadrature`",), ("`adjusted`",), ("best of shapiq's four",), ("ratio",),
        ("ratio, equal time",), ("best of shapiq's eight",), ("ratio",), ("calibration",),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def coalitions_table(results: Iterable[Result]) -> str:
    """Markdown: what coalitions cost that share hidden states, against one evaluation each."""
    rows = []
    for r in (r for r in results if r.protocol == "speed_coalitions"):
        for name in (key.removeprefix("ratio/") for key in r.metrics if key.startswith("ratio/")):
            model, coalitions, way = name.split("/")
            ratio = _ratio(r, name)
            blocks = r.metrics[f"blocks/{model}/{coalitions}/plain"] / r.metrics[f"blocks/{name}"]
            apart = r.metrics[f"largest_difference/{name}"]
            rows.append((model, coalitions, way, ratio, blocks, f"at most {apart:.0e} nats" if apart else "nothing"))
    columns = [("model",), ("coalitions",), ("way",), ("plain / this, CPU seconds", ".2f"),
               ("blocks: plain / this", ".2f"), ("values differ by",)]  # fmt: skip
    return markdown_table(columns, rows)


def goals_table(results: Iterable[Result]) -> str:
    """Markdown: the goals beside what was measured, on each device."""
    results = list(results)
    rows = []
    for r in step_records(results):
        if JUDGED.items() <= r.config.items():
            for goal in GOALS:
                ratio = ratio_of(r, goal.ratio)
                floor = None if goal.floor is None else ratio_of(r, goal.floor)
                rows.append((goal.what, device_of(r), f"≤ {goal.limit:.2f}", ratio, floor, verdict(ratio, goal.limit)))
    for r in (r for r in results if r.protocol == "speed_compile"):
        case = "/".join(JUDGED.values())
        for goal in (goal for goal in GOALS if goal.ratio in COMPILED_GOALS and case in r.data["times"]):
            ratio = _ratio(r, f"{case}/{COMPILED_GOALS[goal.ratio]}")
            rows.append((f"{goal.what}, with `--torch_compile`", device_of(r), f"≤ {goal.limit:.2f}", ratio, None,
                         verdict(ratio, goal.limit)))  # fmt: skip
    for r in (r for r in results if r.protocol == "speed_evaluation"):
        ratio = ratio_of(r, "geometric_mean")
        what = "MTL15 evaluation, examples a second over scoring each label apart, geometric mean"
        rows.append((what, device_of(r), f"≥ {EVALUATION_GOAL:.2f}", ratio, None,
                     verdict(ratio, EVALUATION_GOAL, at_least=True)))  # fmt: skip
    columns = [("ratio",), ("on",), ("goal",), ("measured", ".2f"), ("its floor", ".2f"), ("",)]
    return markdown_table(columns, rows)


def step_counts_table(results: Iterable[Result]) -> str:
    """Markdown: of each contender time, operations and bytes relative to the frozen base, and memory."""
    rows = []
    for r in step_records(results):
        m = r.metrics
        for name in (n for n in CONTENDERS if f"seconds_per_step/{n}" in m):
            relative = (m[f"{key}/{name}"] / m[f"{key}/base"] for key in ("flops", "least_bytes"))
            peak = m.get(f"peak_bytes/{name}")
            rows.append(
                (r.config["model"], r.config["precision"], device_of(r), CONTENDERS[name],
                 1000 * m[f"seconds_per_step/{name}"], ratio_of(r, f"{name}/base"), *relative,
                 m[f"saved_bytes/{name}"] / 1e6, None if peak is None else peak / 1e9)
            )  # fmt: skip
    columns = [("model",), ("precision",), ("on",), ("contender",), ("a step [ms]", ".0f"), ("× base", ".2f"),
               ("operations × base", ".3f"), ("bytes moved at least × base", ".2f"), ("saved for backward [MB]", ".0f"),
               ("peak memory [GB]", ".2f")]  # fmt: skip
    return markdown_table(columns, rows)


def evaluation_table(results: Iterable[Result]) -> str:
    """Markdown: examples a second of evaluating each task, against every label as a row of its own."""
    rows, notes = [], []
    for r in (r for r in results if r.protocol == "speed_evaluation"):
        for name, cell in r.data["tasks"].items():
            naive = r.metrics.get(f"naive_ratio/{name}")
            far = f"at most {r.metrics[f'largest_difference/{name}']:.0e} nats"
            rows.append((name, cell["labels"], cell["examples"], r.metrics[f"examples_per_second/{name}"],
                         _ratio(r, name), naive, far))  # fmt: skip
        rows.append(("geometric mean", None, None, None, _ratio(r, "geometric_mean"), None, None))
        stacked = [f"{_ratio(r, key):.2f} ({key.removeprefix('stacking/')})"
                   for key in (f"stacking/{model}" for model in r.data["stacking"])]  # fmt: skip
        if stacked:
            notes.append(f"Four batches, one after the other / in one pass, the base alone: {', '.join(stacked)}.\n")
    columns = [("task",), ("labels",), ("examples",), ("examples a CPU second", ".1f"), ("× labels apart", ".2f"),
               ("× naive", ".1f"), ("losses differ by",)]  # fmt: skip
    return "\n".join([markdown_table(columns, rows), *notes])


def instruct_table(results: Iterable[Result]) -> str:
    """Markdown: tokens a second and peak memory of instruction tuning, against TRL's trainer."""
    names = {"trl": "TRL", "lora": "this loop, LoRA", "copra": "this loop, CopRA"}
    rows = []
    for r in (r for r in results if r.protocol == "speed_instruct"):
        for key in (key.removeprefix("ratio/") for key in r.metrics if key.startswith("ratio/")):
            contender, _, packed = key.partition(", ")
            ratio = _ratio(r, key)
            rows.append(
                ("yes" if packed else "no", names[contender], f"{r.metrics[f'tokens_per_second/{key}']:.0f}",
                 None if contender == "trl" else ratio, f"{r.metrics[f'peak_bytes/{key}'] / 1e9:.1f} GB")
            )  # fmt: skip
    columns = [("packed",), ("trainer",), ("tokens a CPU second",), ("× TRL's", ".2f"), ("peak memory",)]
    return markdown_table(columns, sorted(rows, key=lambda row: row[0]))


def clip_table(results: Iterable[Result]) -> str:
    """Markdown: images a second of few-shot training and evaluation, against a plain loop."""
    names = {"plain": "training, plain loop", "lora": "training, this loop, LoRA",
             "copra": "training, this loop, CopRA", "evaluation/plain": "evaluating three adapters, plain loop",
             "evaluation/here": "evaluating three adapters, here"}  # fmt: skip
    rows = [
        (label, f"{r.metrics[f'images_per_second/{key}']:.0f}", None if key.endswith("plain") else _ratio(r, key))
        for r in results
        if r.protocol == "speed_clip"
        for key, label in names.items()
    ]
    return markdown_table([("",), ("images a CPU second",), ("× the plain loop's", ".2f")], rows)


def compile_table(results: Iterable[Result]) -> str:
    """Markdown: CopRA's step with compiled blocks against one without, against PEFT and the truncated base, and after
    how many steps compiling has paid."""
    rows = []
    for r in (r for r in results if r.protocol == "speed_compile"):
        for case in r.data["times"]:
            plain, there = (r.metrics[f"seconds_per_step/{case}/{name}"] for name in ("plain", "compiled"))
            took = r.metrics[f"compile_seconds/{case}"]
            pays = f"{took / (plain - there):.0f} steps" if there < plain else "never"
            ratios = (_ratio(r, f"{case}/{pair}") for pair in COMPILED_PAIRS)
            rows.append((*case.split("/"), 1000 * plain, *ratios, f"{took:.0f} s", pays))
    columns = [("model",), ("precision",), ("a step [ms]", ".0f"), ("compiled / plain", ".2f"),
               ("compiled / PEFT LoRA", ".2f"), ("compiled / truncated base", ".2f"), ("plain / PEFT LoRA", ".2f"),
               ("plain / truncated base", ".2f"), ("to compile",), ("pays after",)]  # fmt: skip
    return markdown_table(columns, rows)


def profile_table(results: Iterable[Result]) -> str:
    """Markdown: milliseconds of a step by kind of work, and what an adapter adds to each."""
    rows = []
    for r in (r for r in results if r.protocol == "speed_profile"):
        ms = {name: r.data["milliseconds"][name] for name in PROFILED}
        for kind in ms["base"]:
            own = [ms[name][kind] for name in PROFILED]
            rows.append((r.config["model"], r.config["precision"], kind, *own, own[1] - own[0], own[3] - own[2]))
        total = [sum(ms[name].values()) for name in PROFILED]
        rows.append((r.config["model"], r.config["precision"], "**together**", *total, total[1] - total[0],
                     total[3] - total[2]))  # fmt: skip
    columns = [("model",), ("precision",), ("kind of work",), *((CONTENDERS[name], ".0f") for name in PROFILED),
               ("LoRA − base", "+.0f"), ("CopRA − truncated", "+.0f")]  # fmt: skip
    return markdown_table(columns, rows)


def _ratio(r: Result, key: str) -> Estimate:
    return Estimate(*(r.metrics[f"{what}/{key}"] for what in ("ratio", "ratio_min", "ratio_max")))


def _estimators_cells(budget: int, cells: list[dict], config: dict) -> tuple[str, ...]:
    found = {(c["estimator"], c["setting"]): c for c in cells if c["budget"] == budget}

    def best(names: list[str], setting: str) -> dict:
        return min((found[name, setting] for name in names), key=itemgetter("error"))

    own, other = (found[name, "evaluations"] for name in config["ours"])
    four, eight = (best(names, "evaluations") for names in (config["named"], config["named"] + config["further"]))
    timed = best(config["named"], "time")
    return (
        _percent(own), _percent(other), f"{_percent(four)} ({four['estimator']})",
        _error_ratio(own, four), _error_ratio(own, timed), f"{_percent(eight)} ({eight['estimator']})",
        _error_ratio(own, eight), f"{own['calibration']:.1f}, {other['calibration']:.1f}",
    )  # fmt: skip


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
    square = f"{config['hidden']} × {config['hidden']}"
    tall = f"{config['mlp']} × {config['hidden']}"
    rows = []
    for what, kind, label in (
        (f"one module, {square}", "square", "svd"), (f"one module, {tall}", "tall", "svd"),
        (f"one module, {tall}, PEFT thin", "tall", "svd thin"),
    ):  # fmt: skip
        ours, theirs = m[f"cpu_seconds/{kind}/truncated"], m[f"cpu_seconds/{kind}/PEFT {label}"]
        rows.append((what, _seconds(ours), _seconds(theirs), f"{m[f'cpu_ratio/{kind}, {label}']:.0f}"))
    for label, thin in (("svd", ""), ("svd thin", ", PEFT thin")):
        ours, theirs = m["cpu_seconds/whole/truncated"], m[f"cpu_seconds/whole, PEFT {label}, extrapolated"]
        rows.append((f"all {7 * config['layers']} modules{thin}", _seconds(ours), f"{_seconds(theirs)} (extrapolated)",
                     f"{m[f'cpu_ratio/whole, {label}']:.0f}"))  # fmt: skip
    ours, theirs = m["cpu_seconds/square/ties on delta"], m["cpu_seconds/square/PEFT ties_svd"]
    rows.append((f"`ties --on delta`, one module, {square}", _seconds(ours), _seconds(theirs),
                 f"{m['cpu_ratio/square, ties on delta']:.1f}"))  # fmt: skip
    columns = [("merged and cut to its rank",), ("this package",), ("PEFT",), ("ratio",)]
    far = max(value for name, value in m.items() if name.startswith("distance_to_PEFT/"))
    memory = m["peak_gib/whole, this package"]
    note = f"Peak memory of the whole merge, adapters included: {memory:.1f} GiB. The results differ from PEFT's by at "
    return f"{markdown_table(columns, rows)}\n{note}most {far:.1g} of their norm: PEFT's SVD is in float32.\n"


def _every_rule(r: Result) -> str:
    rows = [(f"`{name.removeprefix('cpu_seconds/layer/')}`", v) for name, v in r.metrics.items() if "/layer/" in name]
    return markdown_table([("one layer (7 modules), by rule, seconds",), ("", ".2f")], rows)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 3600 else f"{value / 3600:.1f} h"
