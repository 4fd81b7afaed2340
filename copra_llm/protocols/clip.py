"""How is the paper's own benchmark run, CLIP on a few images of each class, figure by figure?

A figure is some protocols with a plan each, `PLANS/<name>.yaml`, whose entries are named `<scale>-<shots>`: "paper" is
the paper's setting, "small" one that two cores finish. Whatever a plan does not say is CLIP-LoRA's protocol. Figures
share their runs:

    WORK/<scale>-<shots>/            runs of the tuned setting: figures 2, 3, 4, table 1, ablations
    WORK/<scale>-<shots>/sweeps/     runs over learning rates and steps: figures 5, 6

Source: CopRA (arXiv 2410.22911), section 3; CLIP-LoRA (arXiv 2405.18541), section 4, for the protocol.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError, nearest
from copra_llm.portable import portable_name
from copra_llm.protocols import connectivity, federated, landscape, layer_values, multitask, pruning, sweep
from copra_llm.protocols.command import narrowed
from copra_llm.protocols.plans import read_plans

SETTINGS: dict[str, Any] = {
    "lora_r": 2, "lora_alpha": 1.0,
    # CLIP-LoRA's code divides by the root of the rank.
    "use_rslora": True, "lora_dropout": 0.25, "lora_target_modules": ["qkv"], "learning_rate": 5e-4,
    "lr_scheduler_type": "cosine_with_min_lr", "min_lr": 1e-6, "weight_decay": 1e-2, "max_grad_norm": 0.0,
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 128,
}  # fmt: skip
"""CLIP-LoRA's protocol with CopRA's learning rate, by the flags' names."""
STEPS_A_SHOT = 500
"""Optimizer steps of the protocol are so many times the shots."""


@dataclass(frozen=True)
class Scale:
    """A model, and settings that differ from CLIP-LoRA's paper."""

    model: str
    settings: dict[str, Any]


SCALES = {
    # The one template of CLIP-LoRA's published code, which the paper builds on.
    "paper": Scale("openai/clip-vit-base-patch16", {"template": "a photo of a {}."}),
    # The micro CLIP knows no name of the classes, and rank 2 on q, k and v learns them too slowly for two cores.
    "small": Scale("runs/micro-clip", {
        "lora_r": 8, "lora_alpha": 8.0, "use_rslora": False,
        # All of a block, and nothing outside, which no mask would reach.
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        # Dropout is a third of a step's time on a CPU.
        "lora_dropout": 0.0, "per_device_train_batch_size": 16,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A model, and where its runs and records of one scale and number of shots lie."""

    model: str
    results: Path
    work: Path
    data_root: str | None
    say: Callable[[str], None]
    workers: int | None

    @property
    def folder(self) -> str:
        """The model's name in paths."""
        return portable_name(self.model)

    @property
    def end(self) -> tuple:
        """What every protocol takes last."""
        return self.data_root, self.say, self.workers


def _lines(at: Place, plan: connectivity.Plan) -> None:
    connectivity.run_plan(at.model, plan, at.results, at.work, *at.end)


def _sweep(at: Place, plan: sweep.Sweep) -> None:
    sweep.run_sweep(plan, at.results, at.work, *at.end)


def _landscape(at: Place, plan: landscape.Plan) -> None:
    landscape.run_plan(at.model, plan, at.results, at.work, *at.end)


def _pruned(at: Place, plan: pruning.Plan) -> None:
    # A pruned run's record has the run's own name.
    pruning.run_plan(at.folder, plan, at.work, at.results / "pruned", at.work / "early", *at.end)


def _values(at: Place, plan: layer_values.Plan) -> None:
    layer_values.run_plan(at.folder, plan, at.results, at.work, at.work / "evaluations", *at.end)


def _federated(at: Place, plan: federated.Federation) -> None:
    federated.run_federation(FEDERATED, plan, at.results, at.work / "clients", *at.end)


def _multitask(at: Place, plan: multitask.MultiTask) -> None:
    multitask.run_multitask(plan, at.results, at.work, *at.end)


@dataclass(frozen=True)
class Part:
    """A plan's file, what its entries are, and what runs one of them."""

    plan: str
    kind: type
    run: Callable[[Place, Any], None]
    below: str = ""
    """Folder of its runs and records below those that the figures share."""


FEDERATED = "table-1-federated"
SWEEPS = "sweeps"
FIGURES = {
    "3": [Part("figure-3", connectivity.Plan, _lines)],
    "2": [Part("figure-2", layer_values.Plan, _values)],
    "4": [Part("figure-4", pruning.Plan, _pruned)],
    "6": [
        Part("figure-6-grid", sweep.Sweep, _sweep, SWEEPS),
        Part("figure-6-steps", sweep.Sweep, _sweep, SWEEPS),
    ],
    "5": [
        Part("figure-5-rates", sweep.Sweep, _sweep, SWEEPS),
        Part("figure-5-similarity", landscape.Plan, _landscape, SWEEPS),
    ],
    "table1": [
        Part(FEDERATED, federated.Federation, _federated), Part("table-1-multitask", multitask.MultiTask, _multitask),
    ],
    "ablations": [
        Part("ablations", sweep.Sweep, _sweep), Part("ablations-pruned", pruning.Plan, _pruned),
    ],
}  # fmt: skip
"""The paper's figures and table, and what it has not, in an order in which each finds what it reads: figure 3 trains
what most of them prune and merge, and figure 5 compares all runs of figure 6."""


def run_figures(
    figures: Sequence[str],
    scale: str,
    plans: Path,
    results: Path,
    work: Path,
    *,
    model: str | None = None,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    data_root: str | None = None,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> None:
    """Do what is missing of some figures.

    Args:
        figures: keys of `FIGURES`, done in its order.
        scale: "paper" or "small".
        plans: folder of the plans.
        results: records go to `results/<shots>-shots/...`, as each protocol names them.
        work: adapters and checkpoints.
        model: another one than the scale's.
        tasks: of the plans' tasks, these alone, in plans that have some of them; None: all.
        methods: the same.
        data_root: of the image sets.
        say: reports progress.
        workers: processes side by side; None: one a GPU, or one a core.

    Raises:
        InputError: if a figure or the scale is unknown, a plan is wrong, or the model is a folder that is not there.
    """
    for what, name, known in (*(("figures", figure, FIGURES) for figure in figures), ("scale", scale, SCALES)):
        if name not in known:
            raise InputError(f'--{what}: "{name}" is not one of {", ".join(known)}{nearest(name, known)}; name one')
    model = model or SCALES[scale].model
    if scale == "small" and not Path(model).expanduser().is_dir():
        raise InputError(f"there is no model in {model}; make it with `python recipes/pretrain_micro_clip.py "
                         f"--output_dir {model}`, or give another --model_name_or_path")  # fmt: skip
    for figure in sorted(set(figures), key=list(FIGURES).index):
        for part in FIGURES[figure]:
            for shots, plan in entries(plans, part, scale):
                chosen = narrowed(plan, tasks, methods)
                if chosen is None:
                    continue
                say(f"figure {figure}: {part.plan}, {shots} shots")
                if hasattr(chosen, "model"):
                    chosen = dataclasses.replace(chosen, model=model)
                own = results / f"{shots}-shots" / part.below, work / f"{scale}-{shots}-shots" / part.below
                part.run(Place(model, *own, data_root, say, workers), chosen)


def entries(plans: Path, part: Part, scale: str) -> Iterator[tuple[int, Any]]:
    """The plan's entries of a scale, with their numbers of shots.

    Settings that they do not say are the scale's, and those that it does not say the protocol's.

    Raises:
        InputError: if an entry's name is not `<scale>-<shots>`.
    """
    file = plans / f"{part.plan}.yaml"
    for name, plan in read_plans(file, part.kind).items():
        of, _, shots = name.partition("-")
        if of not in SCALES or not shots.isdigit():
            raise InputError(f"{file}: the entry {name} is not named <scale>-<shots>, as in small-16")
        if of == scale:
            if hasattr(plan, "settings"):
                plan = dataclasses.replace(
                    plan, settings=SETTINGS | SCALES[of].settings | {"shots": int(shots)} | plan.settings
                )
            yield int(shots), plan
