"""What does the model answer to a few prompts while it is trained?

The same prompts at every evaluation and at the end, decoded greedily with the whole adapter active (`generate`), so
that what is learnt can be read beside the curve of the loss. Nothing is drawn and nothing changed: the run ends with
the adapter that it ends with anyway.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from copra_llm.build import Workbench
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.generate import check_lengths, generate, prompts_of, question, stop_of
from copra_llm.progress import Progress
from copra_llm.settings import InstructSettings
from copra_llm.tasks.instruct.encode import Encoder
from copra_llm.tasks.instruct.files import ENDINGS
from copra_llm.tasks.instruct.records import Record, Text
from copra_llm.tasks.instruct.sources import Reader, parse_sources, strict


class Samples:
    """Answers to a run's `--sample_prompts`, kept in its progress.

    Args:
        accelerator: its trackers show the answers, its main process prints them.
        bench: model and tokenizer.
        config: of the run; without prompts nothing is ever asked.
        progress: of the run; answers are added to it.

    Raises:
        InputError: for a file that cannot be read, a prompt that the chat template refuses, or one that leaves the
            model no room for an answer.
    """

    def __init__(self, accelerator: Accelerator, bench: Workbench, config: RunConfig, progress: Progress):
        self.accelerator, self.progress = accelerator, progress
        self.settings, self.batch_size = config.instruct, config.train.per_device_eval_batch_size
        self.bench, self.tokenizer = bench, bench.base.tokenizer
        records = prompt_records(config.instruct) if config.instruct is not None else []
        self.shown = [shown(record) for record in records]
        if not records:
            return
        encoder = Encoder(self.tokenizer, config.instruct.chat_template)
        self.prompts = prompts_of(encoder, records)
        self.stop = stop_of(encoder, chat=not all(isinstance(record, Text) for record in records))
        check_lengths(self.prompts, bench.base.model, config.instruct.max_new_tokens)

    def take(self, classifier, step: int) -> None:
        """Answer the prompts; nothing to do where this step's answers are there.

        Args:
            classifier: with the adapter that the run had after `step`.
            step: optimizer steps done.
        """
        if not self.shown or any(sample["step"] == step for sample in self.progress.samples):
            return
        # Every process answers: where the model's weights are spread over them, none can alone.
        with self.accelerator.autocast():
            answers = self.bench.backend.decode(classifier, self._answers)
        pairs = list(zip(self.shown, answers, strict=True))
        self.progress.samples += [{"step": step, "prompt": prompt, "text": text} for prompt, text in pairs]
        self.accelerator.log(
            {f"samples/{i}": f"**{prompt}**\n\n{text}" for i, (prompt, text) in enumerate(pairs)}, step=step
        )
        if self.accelerator.is_main_process:
            # Above the bar, if there is one.
            tqdm.write("\n".join([f"step {step}", *(f"> {prompt}\n{text}" for prompt, text in pairs)]))

    def _answers(self, classifier) -> list[str]:
        return generate(
            classifier.model, self.tokenizer, self.prompts, self.stop,
            max_new_tokens=self.settings.max_new_tokens, batch_size=self.batch_size,
        )  # fmt: skip


def prompt_records(settings: InstructSettings) -> list[Record]:
    """What `--sample_prompts` ask: a word is a file by its ending, else the text of a user's question.

    Raises:
        InputError: for a file that is missing, no UTF-8, or holds no prompt or a broken record.
    """
    records: list[Record] = []
    for word in settings.sample_prompts:
        if word.endswith(".txt"):
            records += map(question, _lines(Path(word)))
        elif word.endswith(ENDINGS):
            records += strict(itertools.chain.from_iterable(map(Reader, parse_sources([word]))))
        elif word.strip():
            records.append(question(word))
        else:
            raise InputError("--sample_prompts has an empty prompt; leave it out, or give a text")
    return records


def shown(record: Record) -> str:
    """The question of a record as a reader sees it: a text's prompt, or what the user said last."""
    if isinstance(record, Text):
        return record.prompt
    return next((m["content"] for m in reversed(record.messages) if m["role"] == "user"), "")


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"--sample_prompts names {path}, which does not exist; give a file with a prompt a line, or a "
                         "text") from None  # fmt: skip
    except UnicodeDecodeError as error:
        where = f"{path}, which is not UTF-8 text (byte {error.start})"
        raise InputError(f"--sample_prompts names {where}; save it as UTF-8") from None
    if not lines:
        raise InputError(f"--sample_prompts names {path}, which is empty; write a prompt a line into it")
    return lines
