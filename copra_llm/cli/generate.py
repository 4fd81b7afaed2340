"""`copra generate`: what an adapter's model answers, and how good its answers are.

copra generate A --prompt "Name three rivers."                                            # prints the answer
copra generate A --dataset_name gsm8k.jsonl --metrics numeric exact_match --output FILE   # scores, and keeps them
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from copra_llm.cli.common import bar
from copra_llm.errors import InputError

HELP = "Answers of an adapter's model, by greedy decoding: printed, or scored against a file's."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="what a user asks; several are asked one by one")
    parser.add_argument("--dataset_name", "--dataset-name", nargs="+", help="files, folders or Hub ids to answer")
    parser.add_argument("--dataset_format", "--dataset-format", help="of the data; unset: by the columns")
    parser.add_argument("--metrics", nargs="+", default=[],
                        help="exact_match, numeric, rouge_l, f1, or paths of evaluate's metric scripts")  # fmt: skip
    parser.add_argument("--chat_template", "--chat-template", help="chatml, plain, alpaca or a file; unset: the run's")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--max_eval_samples", "--max-eval-samples", type=int, help="records to answer; unset: all")
    parser.add_argument("--per_device_eval_batch_size", "--per-device-eval-batch-size", type=int, default=8)
    parser.add_argument("--model_name_or_path", "--model-name-or-path", help="unset: the base that the adapter names")
    parser.add_argument("--output", help="file for the result record, with every answer")


def run(args: argparse.Namespace) -> int:
    from copra_llm.adapters import adapter_folder, load_adapter_weights
    from copra_llm.evaluate import load_metrics
    from copra_llm.generate import check_lengths, generate, metric_path, prompts_of, stop_of
    from copra_llm.models import load_adapter, load_base
    from copra_llm.saved_runs import read_run
    from copra_llm.tasks.instruct.encode import Encoder
    from copra_llm.tasks.instruct.records import Text

    started = time.time()
    _check_flags(args)
    records = _records(args)
    metrics = load_metrics([metric_path(name) for name in args.metrics])
    config = read_run(args.adapter).config
    base_name = args.model_name_or_path or load_adapter_weights(args.adapter).named_base()
    config = config.replace(model_name_or_path=base_name)
    base = load_base(config.model)
    if base.kind != "causal":
        raise InputError(f"{base_name} is of the kind {base.kind}, which does not go on with a text; give a causal one")
    if args.chat_template is None and config.instruct is not None:
        args.chat_template = config.instruct.chat_template
    encoder = Encoder(base.tokenizer, args.chat_template)
    prompts = prompts_of(encoder, records)
    _check_references(args, prompts)
    check_lengths(prompts, base.model, args.max_new_tokens)
    stop = stop_of(encoder, chat=not all(isinstance(record, Text) for record in records))
    model = _on_device(load_adapter(base, adapter_folder(args.adapter)))
    answers = generate(model, base.tokenizer, prompts, stop, max_new_tokens=args.max_new_tokens,
                       batch_size=args.per_device_eval_batch_size, progress=bar("batch"))  # fmt: skip
    scores = _scores(metrics, prompts, answers)
    for line in answers if not metrics else [f"{name}: {value:.3f}" for name, value in scores.items()]:
        print(line)
    if args.output:
        _write(args, config, base, scores, prompts, answers, time.time() - started)
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    if bool(args.prompt) == bool(args.dataset_name):
        raise InputError("give either --prompt TEXT or --dataset_name FILE, to say what is to be answered")
    if args.metrics and args.prompt:
        raise InputError("--metrics compare with a file's answers, and --prompt has none; give --dataset_name")
    for name in ("max_new_tokens", "max_eval_samples", "per_device_eval_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, but must be at least 1")
    if args.output and Path(args.output).is_dir():
        raise InputError(f"--output names {args.output}, which is a folder; give a file for the record")


def _records(args: argparse.Namespace) -> list:
    import itertools

    from copra_llm.generate import question
    from copra_llm.tasks.instruct.sources import Reader, parse_sources, strict

    if args.prompt:
        return [question(text) for text in args.prompt]
    sources = parse_sources(args.dataset_name, args.dataset_format)
    return list(strict(itertools.chain.from_iterable(map(Reader, sources))))[: args.max_eval_samples]


def _check_references(args: argparse.Namespace, prompts: list) -> None:
    from copra_llm.answer_scores import last_number

    for prompt in prompts if args.metrics else ():
        if prompt.reference is None:
            raise InputError(f"{prompt.place} ends without an answer to compare with; leave --metrics out, or add one")
        if "numeric" in args.metrics and last_number(prompt.reference) is None:
            raise InputError(f"{prompt.place}: the answer has no number for the metric numeric; leave one of them out")


def _on_device(model):
    from accelerate import Accelerator

    return model.to(Accelerator().device)


def _scores(metrics: dict, prompts: list, answers: list[str]) -> dict[str, float]:
    references = [prompt.reference for prompt in prompts]
    found: dict[str, float] = {}
    for metric in metrics.values():
        found |= metric.compute(predictions=answers, references=references)
    return {name: float(value) for name, value in found.items()}


def _write(args, config, base, scores: dict, prompts: list, answers: list[str], seconds: float) -> None:
    from copra_llm.results import Result, environment, write_result

    own = ("adapter", "prompt", "dataset_name", "dataset_format", "metrics", "chat_template", "max_new_tokens",
           "max_eval_samples", "per_device_eval_batch_size")  # fmt: skip
    rows = [{"place": p.place, "answer": answer, "reference": p.reference}
            for p, answer in zip(prompts, answers, strict=True)]  # fmt: skip
    record = Result(
        protocol="generate",
        config=config.flat() | {name: getattr(args, name) for name in own},
        metrics={f"generate/{name}": value for name, value in scores.items()},
        seconds=seconds,
        examples=len(rows),
        data={"answers": rows},
        environment=environment(**base.about()),
    )
    write_result(Path(args.output), record)
