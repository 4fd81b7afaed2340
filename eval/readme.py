"""Fill the READMEs' tables and draw their plots from the committed result records.

    python eval/readme.py            # rewrites README.md, eval/*/README.md, eval/*/curves.svg
    python eval/readme.py --check    # exit 1 if a README is not what the records say

Between `<!-- begin NAME -->` and `<!-- end NAME -->` stands what NAME's function makes of its records.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from copra_llm.protocols.comparisons import Comparison, read_study
from copra_llm.report import connectivity_table, find_results, plot_curves, step_table
from copra_llm.results import Result, write_atomic
from copra_llm.summaries.backends import backends_table
from copra_llm.summaries.clip import few_shot_table
from copra_llm.summaries.faults import faults_table
from copra_llm.summaries.instruct import learning_table, plot_learning, skills_table
from copra_llm.summaries.landscape import layerwise_table, plane_table, similarity_table
from copra_llm.summaries.landscape_plots import draw
from copra_llm.summaries.mtl15 import suite_table
from copra_llm.summaries.plan import plan_table
from copra_llm.summaries.pruning import (
    plot_pruning,
    pruning_details,
    pruning_loss_table,
    pruning_table,
    structured_table,
)
from copra_llm.summaries.shapley import shapley_details, shapley_table
from copra_llm.summaries.speed import (
    clip_table,
    coalitions_table,
    compile_table,
    estimators_table,
    evaluation_table,
    goals_table,
    instruct_table,
    merging_table,
    profile_table,
    step_counts_table,
)
from copra_llm.summaries.study import (
    against_table,
    levels_table,
    means_table,
    progress_table,
    stability_table,
    tasks_table,
)
from copra_llm.summaries.sweep import along_table, schedules_table, sweep_table
from copra_llm.summaries.together import federated_table, multitask_details, multitask_table
from copra_llm.summaries.verdicts import advice_table, verdicts_table

EVAL = Path(__file__).parent
README = EVAL.parent / "README.md"
CLIP = "clip/results/*-shots"
"""Its records, by the number of shots."""


def tuned(records: Sequence[Result]) -> list[Result]:
    """Lines at the settings that eval/interpolation tuned: it draws them whole, eval/mtl15 their ends and middle."""

    def setting(r: Result) -> tuple:
        return tuple(r.config[key] for key in ("model_name_or_path", "task", "label", "learning_rate", "max_steps"))

    lines = [r for r in records if r.protocol == "interpolation"]
    whole = {setting(r) for r in lines if len(r.data["alpha"]) > 3}
    return [r for r in lines if setting(r) in whole]


def tuned_table(records: Sequence[Result]) -> str:
    """The table of the tuned settings."""
    return connectivity_table(tuned(records))


def planned_suite(records: Sequence[Result]) -> str:
    """The table of eval/mtl15's model and tasks at its one setting."""
    ((model, plan),) = yaml.safe_load((EVAL / "mtl15" / "plan.yaml").read_text(encoding="utf-8")).items()
    (rate,), (steps,) = plan["learning_rate"], plan["max_steps"]
    return suite_table(records, model, plan["tasks"], rate, steps)


def planned_backends(records: Sequence[Result]) -> str:
    """The table of eval/backends' plan, row by row."""
    plan = yaml.safe_load((EVAL / "backends" / "plan.yaml").read_text(encoding="utf-8"))
    return backends_table(records, {name: entry for name, entry in plan.items() if name != "all"})


def sixteen_shots(records: Sequence[Result]) -> str:
    """The few-shot table of 16 shots alone."""
    return few_shot_table([r for r in records if r.config["shots"] == 16])


def of_sweep(entry: str, table: Callable[[Sequence[Result]], str]) -> Callable[[Sequence[Result]], str]:
    """A table of what one entry of eval/sweep's plan runs; its records lie with the other entries'."""
    plan = yaml.safe_load((EVAL / "sweep" / "plan.yaml").read_text(encoding="utf-8"))[entry]

    def planned(r: Result) -> bool:
        c = r.config
        return (
            (c.get("variant") or c["method"]) in plan["variants"]
            and c["learning_rate"] in plan["learning_rate"]
            and c["max_steps"] in plan["max_steps"]
        )

    return lambda records: table([r for r in records if planned(r)])


def of_study(entry: str, table: Callable[..., str]) -> Callable[[Sequence[Result]], str]:
    """A table of one entry of eval/study's plan; all entries' records lie together."""

    def made(records: Sequence[Result]) -> str:
        return table(records, study_plan()[entry])

    return made


@functools.cache
def study_plan() -> dict[str, Comparison]:
    """All entries of eval/study's plan."""
    return read_study(EVAL / "study" / "plan.yaml")


def of_whole_study(table: Callable[..., str]) -> Callable[[Sequence[Result]], str]:
    """A table of all entries of eval/study's plan."""
    return lambda records: table(records, study_plan())


STUDIED = (
    "screening",
    "headline",
    "half_long",
    "long",
    "smollm2",
    "fifteen",
    "clip",
    "steps",
    "equal_cost",
    "evenness",
    "granularity",
    "ways",
    "factors",
    "initialisation",
)
"""Entries of eval/study's plan, in the order of its page."""
TABLES = {
    "demo": (connectivity_table, "demo"),
    "interpolation": (tuned_table, "interpolation"),
    "structured": (structured_table, "pruning"),
    "shapley": (shapley_table, "shapley"),
    "layerwise": (layerwise_table, "landscape"),
    "federated": (federated_table, "federated"),
    "multitask": (multitask_table, "multitask"),
    "goals": (goals_table, "speed"),
    "steps": (step_table, "speed"),
    "instruct_speed": (instruct_table, "speed"),
    "instruct": (connectivity_table, "instruct"),
    "few_shot_16": (sixteen_shots, f"{CLIP}/micro-clip"),
    "clip_speed": (clip_table, "speed"),
    "faults": (faults_table, "faults"),
    "advice": (of_whole_study(advice_table), "study"),
}
"""README section -> (function of the records, folder of eval/ whose results they are, or a pattern below it)."""
PAGES = {
    README: TABLES,
    EVAL / "pruning" / "README.md": {
        "pruning": (pruning_table, "pruning"),
        "pruning_details": (pruning_details, "pruning"),
    },
    EVAL / "backends" / "README.md": {"backends": (planned_backends, "backends")},
    EVAL / "sweep" / "README.md": {
        "grid": (of_sweep("grid", sweep_table), "sweep"),
        "along": (along_table, "sweep"),
        "schedules": (of_sweep("schedules", schedules_table), "sweep"),
    },
    EVAL / "mtl15" / "README.md": {"suite": (planned_suite, "interpolation")},
    EVAL / "multitask" / "README.md": {"multitask_details": (multitask_details, "multitask")},
    EVAL / "landscape" / "README.md": {
        "plane": (plane_table, "landscape"),
        "similarity": (similarity_table, "landscape"),
    },
    EVAL / "instruct" / "README.md": {
        "learning": (learning_table, "instruct"),
        "instruct": (connectivity_table, "instruct"),
        "skills": (skills_table, "instruct"),
        "instruct_pruned": (pruning_loss_table, "instruct"),
        "instruct_pruned_accuracy": (pruning_table, "instruct/results/pruned/smollm2/sentiment"),
    },
    EVAL / "clip" / "README.md": {
        "few_shot": (few_shot_table, f"{CLIP}/micro-clip"),
        "clip_choice": (few_shot_table, f"{CLIP}/choice"),
        "clip_pruning": (pruning_table, f"{CLIP}/pruned"),
        "clip_federated": (federated_table, f"{CLIP}/micro-clip"),
        "clip_multitask": (multitask_table, f"{CLIP}/micro-clip"),
        "clip_shapley": (shapley_details, f"{CLIP}/micro-clip"),
        "clip_grid": (sweep_table, f"{CLIP}/sweeps"),
        "clip_along": (along_table, f"{CLIP}/sweeps"),
        "clip_similarity": (similarity_table, f"{CLIP}/sweeps"),
        "clip_layerwise": (layerwise_table, f"{CLIP}/sweeps"),
    },
    EVAL / "study" / "README.md": {
        **{name: (of_study(name, means_table), "study") for name in STUDIED},
        **{f"{name}_against": (of_study(name, against_table), "study") for name in STUDIED},
        "headline_fused": (of_study("headline", tasks_table("fusion")), "study"),
        "headline_single": (of_study("headline", tasks_table("single")), "study"),
        "fifteen_single": (of_study("fifteen", tasks_table("single")), "study"),
        "fifteen_low": (of_study("fifteen", tasks_table("pruned low")), "study"),
        **{f"{name}_levels": (of_study(name, levels_table), "study") for name in ("factors", "initialisation")},
        "progress": (of_whole_study(progress_table), "study"),
        "verdicts": (of_whole_study(verdicts_table), "study"),
        "schedules_verdicts": (of_whole_study(functools.partial(verdicts_table, reference="copra")), "study"),
        "stability": (of_study("headline", stability_table), "study"),
        "unequal": (federated_table, "study/results-clients"),
        "federated": (federated_table, "federated"),
        "multitask": (multitask_table, "multitask"),
        "along": (along_table, "sweep"),
        "similarity": (similarity_table, f"{CLIP}/sweeps"),
        "shapley": (shapley_table, "shapley"),
        "grid": (of_sweep("grid", sweep_table), "sweep"),
        "schedules": (of_sweep("schedules", schedules_table), "sweep"),
    },
    EVAL / "plan" / "README.md": {"plan": (plan_table, "plan")},
    EVAL / "shapley" / "README.md": {"shapley_details": (shapley_details, "shapley")},
    EVAL / "speed" / "README.md": {
        "step_counts": (step_counts_table, "speed"),
        "merging": (merging_table, "speed"),
        "shapley": (estimators_table, "speed"),
        "coalitions": (coalitions_table, "speed"),
        "evaluation": (evaluation_table, "speed"),
        "compile": (compile_table, "speed"),
        "profile": (profile_table, "speed"),
    },
}


def filled(text: str, tables: dict = TABLES) -> str:
    """A README with its tables made anew."""
    for name, (table, folder) in tables.items():
        made = table(records_of(folder)) or "Not run yet.\n"
        block = f"<!-- begin {name} -->\n{made}<!-- end {name} -->"
        text, count = re.subn(rf"<!-- begin {name} -->.*?<!-- end {name} -->", lambda _, b=block: b, text, flags=re.S)
        if count != 1:
            sys.exit(f"there are {count} places for the table {name}, but must be 1")
    return text


@functools.cache
def records_of(folder: str) -> list[Result]:
    """The records of a protocol, or below what a pattern matches, read once; none where nothing has been run."""
    found = sorted(EVAL.glob(folder if "/" in folder else f"{folder}/results"))
    found = [place for place in found if any(place.rglob("*.json"))]
    return find_results(found) if found else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: filled(before[page], tables) for page, tables in PAGES.items()}
    if args.check:
        return int(after != before)
    for page, text in after.items():
        write_atomic(page, text)
    for folder in ("demo", "interpolation"):
        fused = [r for r in tuned(records_of(folder)) if r.config["merge_method"] == "fusion"]
        plot_curves(fused, EVAL / folder / "curves")
    if pruned := records_of("pruning"):
        plot_pruning(pruned, EVAL / "pruning" / "curves")
    if trained := records_of("instruct"):
        plot_learning(trained, EVAL / "instruct" / "learning")
    draw(records_of("landscape"), EVAL / "landscape")
    return 0


if __name__ == "__main__":
    sys.exit(main())
