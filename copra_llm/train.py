"""The training loop: LoRA with a schedule for which layers take part.

    p    = schedule(step / total_steps)
    mask = sample_mask(p, num_layers, seed, step)
    forward, backward and optimizer step with the other layers' adapters left out

Plain LoRA is the schedule p = 1 in the same loop. Everything random is a pure function of a seed and the
step (initialisation, data order, masks, dropout), so a run that was killed and resumed ends with the bytes
it would have reached.

Source: CopRA (arXiv 2410.22911), section 2.1.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, send_to_device
from tqdm import tqdm
from transformers import get_scheduler

from copra_llm.activations import checkpoint_activations, kept_activations
from copra_llm.adapter_files import RESULT
from copra_llm.attention import without_cudnn_attention
from copra_llm.batches import Ahead, BatchStream, EncodedSplit, train_loader
from copra_llm.best import BestAdapter
from copra_llm.build import Workbench, build
from copra_llm.checkpoint import (
    BEST,
    PREEMPTED,
    Progress,
    advance,
    claim,
    refuse_other_settings,
    resume,
    rotate,
    save_adapter,
    save_checkpoint,
    sole_writer,
)
from copra_llm.compensation import compensated, layer_scales
from copra_llm.compiled import check_compile, compiled_blocks
from copra_llm.config import RunConfig
from copra_llm.errors import InputError, Preempted
from copra_llm.evaluate import evaluate, load_metrics, scoring
from copra_llm.example_masks import ExampleMasks, check_example_masks
from copra_llm.gates import LayerGates
from copra_llm.launch import accelerator_of, backend_of, check_launch, check_same_base, process_group
from copra_llm.liger import apply_liger, check_liger
from copra_llm.masks import sample_mask
from copra_llm.neftune import noisy_embeddings
from copra_llm.optimizer import FiniteWatch, make_optimizer
from copra_llm.processes import lost_processes, on_main, sigterm
from copra_llm.results import (
    Result,
    environment,
    pack_bits,
    peak_memory_bytes,
    read_result,
    write_atomic,
    write_result,
)
from copra_llm.samples import Samples
from copra_llm.saved_runs import ADAPTER, step_at
from copra_llm.schedule import too_short
from copra_llm.settings import FLOORED
from copra_llm.stochastic_depth import StochasticDepth


def train_adapter(config: RunConfig, tasks: list[str], folder: Path) -> Result:
    """Train one adapter on the tasks and write `folder/{adapter,result.json,config.yaml,checkpoint-*}`.

    Args:
        config: the run's settings.
        tasks: one task, or several that share the adapter.
        folder: where to write; if the config asks to resume, the record of a finished run with these settings found
            there is returned as it is.

    Raises:
        InputError: for wrong input, a run that keeps diverging, or a folder in which another run is at work.
        OSError: for a folder that cannot be written.
        Preempted: after SIGTERM, once a checkpoint is written.
        LostProcess, ToldElsewhere: where several processes train, and another one has ended or refused.
    """
    accelerator = _accelerator(config, folder)
    with lost_processes(accelerator), sole_writer(accelerator, folder):
        check_launch(accelerator, config)
        finished = on_main(accelerator, lambda: _finished(accelerator, config, folder))
        return finished or _train(accelerator, config, tasks, folder)


def _finished(accelerator: Accelerator, config: RunConfig, folder: Path) -> Result | None:
    """The record of the run that the config asks to resume, if it has ended."""
    if config.train.resume_from_checkpoint != "latest" or not (folder / RESULT).is_file():
        return None
    finished = read_result(folder / RESULT)
    examples = finished.examples // finished.steps, _examples_a_step(config, accelerator)
    refuse_other_settings(folder / RESULT, finished.config, config, examples)
    return finished


def _train(accelerator: Accelerator, config: RunConfig, tasks: list[str], folder: Path) -> Result:
    started = time.time()
    if config.train.report_to:
        shown = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.flat().items()}
        accelerator.init_trackers("copra_llm", config=shown)
    if config.train.use_liger_kernel:
        check_liger(accelerator.device)
    if config.train.torch_compile:
        check_compile(config, accelerator.device)
    if config.schedule.mask_per == "example":
        check_example_masks(config, accelerator, tasks)
    more_metrics = load_metrics(config.train.metrics)
    bench = build(config, tasks)
    check_same_base(accelerator, bench.base.fingerprint)
    if config.train.gradient_checkpointing:
        checkpoint_activations(bench.base.model)
    if config.train.use_liger_kernel:
        # After all that asks the model something on the CPU, where the kernels do not run.
        apply_liger(bench.base.model)
    progress = fit(accelerator, bench, config, folder)

    metrics: dict[str, float] = {}
    data: dict[str, Any] = {"log": progress.log, "dev": progress.dev, "skipped_steps": progress.skipped}
    if progress.samples:
        data["samples"] = progress.samples
    # Where it was begun on another number of processes, the settings alone would not repeat its batches.
    if progress.stream_batch_size != config.train.per_device_train_batch_size:
        data["stream_batch_size"] = progress.stream_batch_size
    data |= bench.backend.communication(progress.sent)
    if bench.counts:
        data["records"] = {split: vars(counts) for split, counts in bench.counts.items()}
    for split in ("dev", "test"):
        for task, examples in bench.splits.get(split, {}).items():
            outcome = evaluate(accelerator, bench.classifier, examples, config.train.per_device_eval_batch_size)
            metrics |= outcome.metrics(f"{split}/{task}", more_metrics)
            data[f"correct/{split}/{task}"] = pack_bits(outcome.correct)
    result = Result(
        protocol="train",
        config=config.replace(tasks=tasks).flat(),
        metrics=metrics,
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        steps=progress.step,
        examples=progress.step * progress.examples_a_step,
        data=data,
        environment=run_environment(accelerator, bench),
    )

    def write() -> None:
        save_adapter(classifier, folder / ADAPTER)
        (folder / PREEMPTED).unlink(missing_ok=True)
        write_result(folder / RESULT, result)
        shutil.rmtree(folder / BEST, ignore_errors=True)

    with bench.backend.whole(bench.classifier) as classifier:
        on_main(accelerator, write)
    # Not `end_training`, which would part the processes: the next task needs them.
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.free_memory()
    return result


def train_each(config: RunConfig) -> Iterator[Result]:
    """Train an adapter a task, or one for all of them (`joint`), each into `OUTPUT/<task>/`; as `train_adapter`."""
    groups = [config.data.tasks] if config.data.joint else [[task] for task in config.data.tasks]
    for tasks in groups:
        yield train_adapter(config, tasks, run_folder(config, tasks))


def run_folder(config: RunConfig, tasks: list[str]) -> Path:
    """Where `train_each` writes the adapter of these tasks."""
    return Path(config.train.output_dir) / "+".join(tasks)


def print_metrics(result: Result) -> None:
    """One metric a line, on the main process."""
    if PartialState().is_main_process:
        for name, value in result.metrics.items():
            print(f"{name}: {value:.3f}")


def fit(
    accelerator: Accelerator,
    bench: Workbench,
    config: RunConfig,
    folder: Path,
    on_step: Callable[[], None] = lambda: None,
) -> Progress:
    """Run the loop from the newest checkpoint (if asked to resume) to the last step; `on_step` is called after each."""
    settings, classifier = config.train, bench.classifier
    splits = list(bench.splits["train"].values())
    total_steps = _total_steps(config, accelerator, sum(map(len, splits)))
    schedule = config.schedule.schedule()
    gates = LayerGates(
        classifier, config.schedule.granularity, config.schedule.layer_pattern, fused=settings.use_fused_lora
    )
    examples, example_by_example = _examples_a_step(config, accelerator), config.schedule.mask_per == "example"
    apart = ExampleMasks(gates, example_by_example, settings.seed_of("mask"), examples)
    depth = StochasticDepth(classifier, gates.keys, config.schedule.stochastic_depth, settings.seed_of("mask"))
    optimizer = make_optimizer(classifier, settings)
    # Not prepared: Accelerate would step it once a process, but rate and p(t) count optimizer steps.
    first, whole = config.part.span_in_steps(total_steps)
    floor = {"min_lr": settings.min_lr} if settings.lr_scheduler_type == FLOORED else None
    scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, settings.warmup_steps, whole, floor)
    advance(scheduler, first)
    progress = resume(accelerator, config, folder, classifier, optimizer, scheduler, examples, total_steps)
    samples = Samples(accelerator, bench, config, progress)
    # Where masks are drawn for each example, some of them have each layer in nearly every step.
    why = too_short(schedule, whole, gates.num_layers) if progress.step == 0 and not example_by_example else None
    if why and accelerator.is_main_process:
        print(f"warning: {why}", file=sys.stderr)
    claim(accelerator, folder, config.replace(tasks=[task.name for task in bench.tasks]))
    micro_batches = examples // progress.stream_batch_size
    stream = BatchStream(
        splits,
        progress.stream_batch_size,
        settings.seed_of("data"),
        start=(first + progress.step) * micro_batches,
        stop=(first + total_steps) * micro_batches,
    )
    ahead = Ahead.asked(settings, accelerator.device)
    loader = train_loader(classifier, splits, stream, settings.per_device_train_batch_size, ahead)
    backend = bench.backend = backend_of(accelerator, settings)
    bench.classifier = classifier = backend.prepare(classifier, optimizer, gates)
    classifier.train()
    watch = FiniteWatch(accelerator.device, settings.max_nonfinite_steps, progress)
    best = BestAdapter(backend, folder, settings, lambda step: schedule.settled((first + step) / whole), progress)
    keep_at = {step_at(fraction, total_steps) for fraction in settings.checkpoint_at}
    batches = iter(accelerator.prepare_data_loader(loader))
    if not settings.torch_compile:  # which joins operations by itself
        _see_shared_inputs(accelerator, gates, classifier, splits[0])
    logged = _RunningLoss(accelerator.device, *progress.unlogged)
    clock = time.time() - progress.seconds
    noise = noisy_embeddings(bench.base.model, settings.neftune_noise_alpha)
    signals = sigterm(accelerator, settings.ddp_timeout)
    regions = gates.keys if settings.torch_compile else []
    compiled = compiled_blocks(bench.base.model, regions, settings.torch_compile_backend)
    kept, sound = kept_activations(bench.base.model), without_cudnn_attention()
    with noise, kept, sound, compiled, _bar(accelerator, progress.step, total_steps) as bar, signals as asked_to_stop:
        for step in range(progress.step, total_steps):
            now = first + step  # of `whole`: the run may be a part of a longer one
            p = schedule.of_layers(now / whole, gates.num_layers)
            mask = sample_mask(p, gates.num_layers, seed=settings.seed_of("mask"), step=now)
            mask = apart.draw(mask, p, now)
            _seed_noise(settings.seed_of("data"), now, accelerator.process_index)
            with apart.applied(), gates.applied(mask, layer_scales(config.schedule, p)), depth.applied(now):
                parts = next_step(accelerator, batches, settings.gradient_accumulation_steps)
                for part, batch in enumerate(parts, 1):
                    apart.turn(settings.per_device_train_batch_size)
                    loss = classifier(batch)
                    backend.backward(loss, last=part == len(parts))
                    logged.add(loss)
                    watch.see(loss)
                with compensated(config.schedule, optimizer, p):
                    norm = backend.step(mask, watch)
            scheduler.step()
            progress.step = step + 1
            progress.seconds = time.time() - clock
            progress.sent = backend.count(progress.sent)
            last = progress.step == total_steps
            bar.update()
            on_step()
            if progress.step % settings.logging_steps == 0 or last:
                watch.read(step)
                entry = {"loss": logged.mean(), "learning_rate": scheduler.get_last_lr()[0], "grad_norm": float(norm),
                         "activation_prob": sum(p) / len(p), "active_layers": int(mask.sum())}  # fmt: skip
                progress.log.append({"step": progress.step, **entry})
                accelerator.log({f"train/{key}": value for key, value in entry.items()}, step=progress.step)
                bar.set_postfix(loss=f"{entry['loss']:.3f}", p=f"{entry['activation_prob']:.2f}")
            if settings.eval_steps and progress.step % settings.eval_steps == 0:
                if best.wanted or not last:
                    _evaluate_dev(accelerator, bench, settings.per_device_eval_batch_size, progress)
                    best.look(classifier)
                samples.take(classifier, progress.step)
            regular = bool(settings.save_steps) and progress.step % settings.save_steps == 0
            stopping = asked_to_stop()
            if regular or stopping or progress.step in keep_at:
                watch.read(step)
                progress.unlogged = logged.so_far()
                save_checkpoint(accelerator, classifier, backend, config, folder, progress)
                if regular:
                    rotate(accelerator, folder, settings, keep_at, progress.step)
            if stopping and not last:
                said = f"stopped by SIGTERM after step {progress.step}\n"
                on_main(accelerator, functools.partial(write_atomic, folder / PREEMPTED, said))
                raise Preempted(f"stopped after step {progress.step} of {total_steps}; resume with "
                                f"--resume_from_checkpoint latest")  # fmt: skip
            if best.exhausted():
                break
    samples.take(classifier, best.restore(classifier))
    return progress


# --- parts of the loop ------------------------------------------------------------------------------------


def _see_shared_inputs(
    accelerator: Accelerator, gates: LayerGates, classifier: torch.nn.Module, split: EncodedSplit
) -> None:
    """Show the gates a forward pass over one example.

    Before the first step, also of a resumed run: which layers are computed together decides in which order they round.
    """
    collate = accelerator.unwrap_model(classifier).collate
    batch = send_to_device(collate(split.task, [split.view(0)], split.labels[:1]), accelerator.device)
    with scoring(accelerator, classifier):
        gates.find_shared_inputs(lambda: classifier(batch))


def next_step(accelerator: Accelerator, batches: Iterator[dict], count: int) -> list[dict]:
    """The micro-batches of one optimizer step.

    Where losses are means over trained tokens, all of them, on all processes, are divided by the same number, so that
    a token counts the same wherever it stands.
    """
    step = [next(batches) for _ in range(count)]
    if "trained" in step[0] and count * accelerator.num_processes > 1:
        # Filled in on the device: to copy a number there would wait for it.
        items = torch.full((), float(sum(len(batch["trained"]) for batch in step)), device=accelerator.device)
        items = accelerator.reduce(items, reduction="sum") / (count * accelerator.num_processes)
        step = [batch | {"items": items} for batch in step]
    return step


class _RunningLoss:
    """Mean loss since it was last asked, kept on the device."""

    def __init__(self, device, total: float = 0.0, count: int = 0):
        self.sum, self.count = torch.tensor(total, device=device), count

    def add(self, loss: torch.Tensor) -> None:
        self.sum += loss.detach().float()
        self.count += 1

    def so_far(self) -> tuple[float, int]:
        return float(self.sum), self.count

    def mean(self) -> float:
        mean = float(self.sum) / max(1, self.count)
        self.sum.zero_()
        self.count = 0
        return mean


def _seed_noise(seed: int, step: int, rank: int) -> None:
    """Dropout as a function of (seed, step, rank): a resumed run needs no generator's state."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def _evaluate_dev(accelerator: Accelerator, bench: Workbench, batch_size: int, progress: Progress) -> None:
    entry: dict[str, float] = {}
    for task, examples in bench.splits["dev"].items():
        entry |= evaluate(accelerator, bench.classifier, examples, batch_size).metrics(f"dev/{task}")
    progress.dev.append({"step": progress.step, **entry})
    accelerator.log(entry, step=progress.step)


def _accelerator(config: RunConfig, folder: Path) -> Accelerator:
    settings = config.train
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in settings.report_to:
        if name not in available:
            raise InputError(f'--report_to "{name}" is no tracker that is installed; '
                             f"installed are {', '.join(available) or 'none'}")  # fmt: skip
    if settings.fp16 and not torch.cuda.is_available():
        raise InputError("--fp16 needs a GPU, and there is none; use --bf16 or neither")
    return accelerator_of(
        settings,
        # A step's micro-batches are all read before the first is used, the run's last ones too: that the data are at
        # their end must not end the accumulation.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(non_blocking=settings.dataloader_pin_memory),
        log_with=settings.report_to or None,
        project_dir=str(folder),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[process_group(settings)],
    )


def _examples_a_step(config: RunConfig, accelerator: Accelerator) -> int:
    settings = config.train
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes


def _total_steps(config: RunConfig, accelerator: Accelerator, examples: int) -> int:
    if config.train.max_steps != -1:
        return config.train.max_steps
    return max(1, math.ceil(config.train.num_train_epochs * examples / _examples_a_step(config, accelerator)))


def run_environment(accelerator: Accelerator, bench: Workbench) -> dict[str, Any]:
    """What the record says of machine, libraries and base model."""
    device = accelerator.device
    return environment(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        world_size=accelerator.num_processes,
        threads=torch.get_num_threads(),
        **bench.base.about(),
    )


@contextlib.contextmanager
def _bar(accelerator: Accelerator, done: int, total: int):
    quiet = not accelerator.is_main_process or not sys.stderr.isatty()
    with tqdm(total=total, initial=done, unit="step", disable=quiet, dynamic_ncols=True) as bar:
        yield bar
