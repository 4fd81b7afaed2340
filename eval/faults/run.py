"""Does a run that is killed at any moment end with the bytes that it would have reached?

    python eval/faults/run.py [--trials 120] [--seed 0]

A trial is a run of a tiny random model in a new folder. It is killed (SIGKILL) one to three times, each time in a new
process that goes on from the newest checkpoint, and then left to end. When it is killed is drawn from (seed, trial,
kill): half of the times a moment of the whole run, half of the times a moment within one of its phases, since saving
takes so little time that few moments would fall into it. Processes are forked from this one, which has the libraries
loaded. The record is written after every trial, and a stopped command goes on after the last one.
"""

import argparse
import gc
import hashlib
import mmap
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from copra_llm import train
from copra_llm.best import BestAdapter
from copra_llm.checkpoint import broken, checkpoints
from copra_llm.config import RunConfig
from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.results import Result, environment, read_result, temporary_of, write_result
from copra_llm.summaries.faults import PHASES, faults_table
from copra_llm.tasks.mtl15 import get_task, load_split

HERE = Path(__file__).parent
TASK = "sst2"
START, STEP, SAVE, EVALUATION, END = range(len(PHASES))
SETTINGS = {
    "tasks": [TASK], "data_root": "sample", "max_length": 40, "max_eval_samples": 4, "max_steps": 12,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lora_r": 2,
    "lora_dropout": 0.2, "logging_steps": 2, "eval_steps": 3, "load_best_model_at_end": True, "save_steps": 2,
    "save_total_limit": 2, "resume_from_checkpoint": "latest",
}  # fmt: skip
"""With dropout, accumulation, rotation and the best adapter: whatever has to come out the same."""
MOST_SECONDS = 300
"""Of one process; it takes a few."""


class Board:
    """What the training process tells about itself, in memory that it shares with this one."""

    def __init__(self):
        self.numbers = np.frombuffer(mmap.mmap(-1, 4 * (4 + len(PHASES))), dtype=np.int32)

    def clear(self) -> None:
        self.numbers[:] = 0

    # Phase it is in; step it has begun with, done and saved; how often it has entered each phase.
    phase, first, step, saved = (property(lambda self, i=i: int(self.numbers[i])) for i in range(4))

    @property
    def entered(self) -> np.ndarray:
        return self.numbers[4:]

    def enter(self, phase: int) -> None:
        self.numbers[0] = phase
        self.entered[phase] += 1


class Bar:
    """Stands where the loop's progress bar does, and knows when the loop begins, takes a step, and ends."""

    def __init__(self, board: Board, done: int):
        self.board = board
        board.numbers[1:3] = done

    def __enter__(self):
        self.board.enter(STEP)
        return self

    def __exit__(self, *exception) -> None:
        self.board.enter(END)

    def update(self) -> None:
        self.board.numbers[2] += 1
        self.board.entered[STEP] += 1

    def set_postfix(self, **shown) -> None:
        pass


def observe(board: Board) -> None:
    """Have this process's training tell the board what it does."""

    def during(phase: int, action: Callable) -> Callable:
        def observed(*args):
            before = board.phase
            board.enter(phase)
            action(*args)
            board.numbers[0] = before

        return observed

    def save(*args):
        honest_save(*args)
        board.numbers[3] = args[-1].step

    honest_save = train.save_checkpoint
    train._bar = lambda accelerator, done, total: Bar(board, done)
    train.save_checkpoint = during(SAVE, save)
    train.rotate = during(SAVE, train.rotate)
    BestAdapter.look = during(SAVE, BestAdapter.look)
    train._evaluate_dev = during(EVALUATION, train._evaluate_dev)


def launch(board: Board, config: RunConfig, folder: Path, log: Path, moment: Callable[[], bool]) -> bool:
    """Train in a forked process, and kill it when the moment has come.

    Returns:
        Whether it was killed; False: it had ended before.

    Raises:
        AssertionError: if it ended in disorder, or took far too long.
    """
    board.clear()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(log, "a", encoding="utf-8") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            observe(board)
            code = exit_on_input_error(lambda: train.train_adapter(config, [TASK], folder) and None)()
        finally:
            os._exit(code)
    started = time.monotonic()
    while not moment():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a run ended with status {status}:\n{log.read_text(encoding='utf-8')}"
            return False
        assert time.monotonic() - started < MOST_SECONDS, f"a run takes too long:\n{log.read_text(encoding='utf-8')}"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class Law:
    """When a run is killed, given how an uninterrupted one went.

    Args:
        entered: how often it entered each phase.
        spent: seconds in each phase.
    """

    def __init__(self, entered: np.ndarray, spent: np.ndarray):
        self.entered, self.length = entered, spent / entered
        self.seconds, self.once = float(spent.sum()), float(spent[START] + spent[END])

    def moment(self, rng: np.random.Generator, board: Board, left: float) -> Callable[[], bool]:
        """A condition that becomes true at a random moment after now.

        Args:
            rng: draws it.
            board: of the process that is to be killed.
            left: share of the steps that it still has to take.
        """
        started = time.monotonic()
        if rng.random() < 0.5:
            wait = rng.uniform(0, self.once + left * (self.seconds - self.once))
            return lambda: time.monotonic() - started > wait
        phase = int(rng.integers(len(PHASES)))
        entries = max(1, round(left * int(self.entered[phase])))
        entry, wait = int(rng.integers(1, entries + 1)), rng.uniform(0, self.length[phase])
        since: list[float] = []

        def come() -> bool:
            if not since and board.entered[phase] >= entry:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > wait

        if phase == START:
            return lambda: time.monotonic() - started > wait
        return come


def uninterrupted(board: Board, config: RunConfig, folder: Path) -> Law:
    """Run it once, and note how long it is in which phase."""
    spent, last = np.zeros(len(PHASES)), [time.monotonic()]

    def watch() -> bool:
        now = time.monotonic()
        spent[board.phase] += now - last[0]
        last[0] = now
        return False

    launch(board, config, folder, folder.with_suffix(".log"), watch)
    entered = board.entered.copy()
    entered[START] = 1
    return Law(entered, spent)


def trial(number: int, seed: int, law: Law, board: Board, config: RunConfig, folder: Path, wanted: Path) -> dict:
    """Kill a run one to three times, let it end, and compare it with the uninterrupted one."""
    rng, log = np.random.default_rng([seed, number]), folder.with_suffix(".log")
    kills, lost, torn, saved = [], 0, 0, 0
    for left in range(int(rng.integers(1, 4)), -1, -1):
        moment = law.moment(rng, board, 1 - saved / config.train.max_steps) if left else lambda: False
        killed = launch(board, config, folder, log, moment)
        # The board is the process's own account: what it began with, and the last save that had returned.
        lost += bool(board.entered[STEP]) and board.first < saved
        saved = max(saved, board.saved)
        if not killed:
            break
        kills.append({"phase": PHASES[board.phase], "step": board.step, "saved": saved})
        torn += any(broken(checkpoint) for checkpoint in checkpoints(folder))
    left_behind = [path.name for path in folder.iterdir() if temporary_of(path) or path.name in (".lock", "best")]
    return {"kills": kills, "lost": lost, "torn": torn, "different": outcome(folder) != outcome(wanted),
            "left_behind": left_behind}  # fmt: skip


def outcome(folder: Path) -> tuple:
    """What must be the same: the adapter's bytes, its metrics, and what was logged."""
    result = read_result(folder / "result.json")
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), result.metrics, result.data


def summary(trials: list[dict]) -> dict[str, float]:
    """Counts over the trials."""
    kills = [kill for one in trials for kill in one["kills"]]
    counts = {f"kills/{phase}": sum(kill["phase"] == phase for kill in kills) for phase in PHASES}
    of_all = {name: sum(one[name] for one in trials) for name in ("lost", "torn", "different")}
    left = sum(bool(one["left_behind"]) for one in trials)
    return {"trials": len(trials), "kills": len(kills), **counts, **of_all, "left_behind": left}


def save_model(folder: Path) -> None:
    """A random LlamaForCausalLM of 4 layers with a tokenizer of single bytes and common words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    teacher = trainers.BpeTrainer(vocab_size=500, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    examples = load_split(get_task(TASK), "train", "sample", None)
    tokenizer.train_from_iterator([text for e in examples for text in e.fields.values()], teacher)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                         num_attention_heads=4, initializer_range=0.2, pad_token_id=0, eos_token_id=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    record = args.results / f"seed-{args.seed}.json"
    own = SETTINGS | {"model_name_or_path": "random Llama, 4 layers, hidden 32", "seed": args.seed}
    trials, seconds = [], 0.0
    if record.is_file():
        before = read_result(record)
        if before.config != own:
            raise InputError(f"{record} was made with other settings; move it away, or give another --seed")
        trials, seconds = before.data["trials"], before.seconds
    torch.set_num_threads(1)
    gc.freeze()  # what is loaded by now is nothing that a forked process has to search
    board = Board()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        save_model(work / "model")
        config = RunConfig().replace(**SETTINGS, model_name_or_path=str(work / "model"))
        law = uninterrupted(board, config, work / "wanted")
        adapter = hashlib.sha256(outcome(work / "wanted")[0]).hexdigest()
        started = time.time() - seconds
        for number in range(len(trials), args.trials):
            trials.append(trial(number, args.seed, law, board, config, work / f"trial-{number}", work / "wanted"))
            print(f"{number}: {trials[-1]}", flush=True)
            data = {"trials": trials, "adapter_sha256": adapter, "uninterrupted_seconds": law.seconds}
            write_result(record, Result("faults", own, summary(trials), time.time() - started, data=data,
                                        environment=environment(threads=1)))  # fmt: skip
    result = read_result(record)
    print(faults_table([result]))
    return int(any(result.metrics[name] for name in ("lost", "torn", "different", "left_behind")))


if __name__ == "__main__":
    sys.exit(main())
