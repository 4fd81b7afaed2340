"""What does instruction tuning cost here, and what with TRL's SFTTrainer?

    python eval/speed/instruct.py [--rounds 3] [--steps 12]      (needs trl, and $COPRA_DATA/instruct/alpaca)

The same base model, adapter, precision, optimizer, examples and trained tokens; one thread. Each contender is a
process of its own, since peak memory is one; rounds are interleaved. Costs are CPU seconds, since the machine may be
shared (on an idle core they are wall-clock seconds), from the first step's end to the last one's: loading and the
first step do not count. Tokens are those of examples, padding left out.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from copra_llm.errors import InputError, exit_on_input_error
from copra_llm.protocols.alone import alone
from copra_llm.results import Result, environment, peak_memory_bytes, write_result

HERE = Path(__file__).parent
RECORD = HERE / "results" / "instruct.json"
MODEL, EXAMPLES, MAX_LENGTH = "smollm2", 512, 512
ROWS = {False: 8, True: 2}
"""Rows of a batch, without packing (8 examples) and with it (2 rows of 512 tokens: about as many tokens)."""
RATE, RANK, ALPHA = 2e-4, 8, 16
CONTENDERS = ("trl", "lora", "copra")


def alpaca() -> list[dict]:
    """The first examples of Alpaca."""
    path = Path(os.environ.get("COPRA_DATA", HERE.parents[2] / "shared" / "datasets")) / "instruct/alpaca/train.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is not there; set COPRA_DATA to the folder that holds instruct/alpaca")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(EXAMPLES), strict=False)]


class Clock:
    """CPU seconds and tokens after each step."""

    def __init__(self):
        self.seconds, self.tokens = [], []
        self._running = 0

    def saw(self, tokens: int) -> None:
        self._running += tokens

    def step(self) -> None:
        self.seconds.append(time.process_time())
        self.tokens.append(self._running)

    def result(self) -> dict:
        """Without the first step."""
        return {
            "seconds": self.seconds[-1] - self.seconds[0],
            "tokens": self.tokens[-1] - self.tokens[0],
            "peak_bytes": peak_memory_bytes(),
        }


def run_trl(packing: bool, steps: int, folder: str) -> dict:
    """TRL's trainer with its defaults, but for what is the same for all."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from copra_llm.models import resolve

    clock, load_from = Clock(), resolve(MODEL).load_from
    rows = [
        {
            "prompt": [{"role": "user", "content": "\n\n".join(x for x in (row["instruction"], row["input"]) if x)}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in alpaca()
    ]

    class Steps(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.step()

    config = SFTConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=ROWS[packing], packing=packing,
        max_length=MAX_LENGTH, learning_rate=RATE, lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", bf16=False, gradient_checkpointing=False, logging_steps=steps, report_to=[],
        save_strategy="no", seed=0, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(load_from),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(load_from),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Steps()],
    )
    collate = trainer.data_collator

    def counted(examples):
        clock.saw(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return clock.result() | {"dataset_tokens": sum(lengths)}


def run_here(method: str, packing: bool, steps: int, folder: str) -> dict:
    """This package's loop."""
    from accelerate import Accelerator

    import copra_llm.train as train
    from copra_llm.build import build
    from copra_llm.config import RunConfig

    path = Path(folder) / "alpaca.jsonl"
    path.write_text("\n".join(map(json.dumps, alpaca())), encoding="utf-8")
    config = RunConfig().replace(
        model_name_or_path=MODEL, dataset_name=[str(path)], eval_dataset_name=[str(path)], tasks=["instruct"],
        method=method, max_steps=steps, per_device_train_batch_size=ROWS[packing], packing=packing,
        max_length=MAX_LENGTH, learning_rate=RATE, lora_r=RANK, lora_alpha=ALPHA, lora_target_modules=["all-linear"],
        logging_steps=steps, checkpoint_at=[], output_dir=folder,
    )  # fmt: skip
    clock, bench = Clock(), build(config, ["instruct"], splits=("train",))
    collate = bench.classifier.collate

    def counted(task, rows, labels):
        clock.saw(sum(len(example) for row in rows for example in row))
        return collate(task, rows, labels)

    bench.classifier.collate = counted

    train.fit(Accelerator(), bench, config, Path(folder), clock.step)
    split = bench.splits["train"]["instruct"]
    return clock.result() | {"dataset_tokens": int(split.lengths.sum())}


def measured(contender: str, packing: bool, steps: int) -> dict:
    """One contender in a process of its own."""
    return alone(Path(__file__), ["--worker", contender, "--steps", str(steps), *["--packing"] * packing])


@exit_on_input_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--packing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            own = run_trl if args.worker == "trl" else lambda *a: run_here(args.worker, *a)
            print(json.dumps(own(args.packing, args.steps, folder)))
        return

    alpaca()
    started, found = time.time(), {}
    for _ in range(args.rounds):
        for packing in (False, True):
            for contender in CONTENDERS:
                outcome = measured(contender, packing, args.steps)
                found.setdefault(f"{contender}{', packed' if packing else ''}", []).append(outcome)
                print(f"{contender}, packing {packing}: {outcome['tokens'] / outcome['seconds']:.0f} tokens a second, "
                      f"{outcome['peak_bytes'] / 1e9:.2f} GB", flush=True)  # fmt: skip
    metrics = {}
    for name, outcomes in found.items():
        rival = found["trl, packed" if "packed" in name else "trl"]
        speeds, rivals = ([o["tokens"] / o["seconds"] for o in side] for side in (outcomes, rival))
        ratios = [a / b for a, b in zip(speeds, rivals, strict=True)]
        metrics |= {
            f"tokens_per_second/{name}": statistics.median(speeds),
            f"ratio/{name}": statistics.median(speeds) / statistics.median(rivals),
            f"ratio_min/{name}": min(ratios),
            f"ratio_max/{name}": max(ratios),
            f"peak_bytes/{name}": float(max(o["peak_bytes"] for o in outcomes)),
        }
        print(f"{name}: {metrics[f'ratio/{name}']:.2f} × TRL's tokens a second "
              f"(rounds {min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
    settings = {"model_name_or_path": MODEL, "examples": EXAMPLES, "max_length": MAX_LENGTH, "rounds": args.rounds,
                "rows": ROWS[False], "rows_packed": ROWS[True], "lora_r": RANK, "learning_rate": RATE}  # fmt: skip
    record = Result("speed_instruct", settings, metrics, time.time() - started, steps=args.steps,
                    data={"runs": found}, environment=environment(threads=1, trl=version("trl")))  # fmt: skip
    write_result(RECORD, record)


if __name__ == "__main__":
    sys.exit(main())
