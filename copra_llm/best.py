"""Which adapter of a run had the least dev loss, and is it time to stop?

Only evaluations after the ramp count: before it some layers' adapters have hardly been trained, and whether the loss
rises or falls says nothing about where the run will end. What is best follows from the run's own list of evaluations,
so nothing has to be saved for it but the adapter itself, in `best/` beside the checkpoints. It stays there until the
run's own adapter is written: a run that is killed in between finds it again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from copra_llm.backends import Backend
from copra_llm.checkpoint import BEST, load_weights, save_adapter
from copra_llm.processes import on_main
from copra_llm.progress import Progress
from copra_llm.settings import TrainSettings


class BestAdapter:
    """Keeps the best adapter while a run goes on.

    Args:
        backend: that of the run; its main process writes.
        folder: of the run.
        settings: of the run; keeps nothing if they ask for nothing.
        settled: whether the ramp has ended after so many steps.
        progress: of the run; its evaluations are read.
    """

    def __init__(
        self,
        backend: Backend,
        folder: Path,
        settings: TrainSettings,
        settled: Callable[[int], bool],
        progress: Progress,
    ):
        self.backend, self.folder, self.settings = backend, folder / BEST, settings
        self.settled, self.progress = settled, progress
        self._first = 0
        # Of a run that goes on in another folder: what is not there any more cannot be the best.
        if self.wanted and self.step is not None and not self.folder.is_dir():
            self._first = progress.step + 1

    @property
    def wanted(self) -> bool:
        """Whether the run ends with its best adapter."""
        return self.settings.keeps_best

    @property
    def step(self) -> int | None:
        """The step of the least loss; None before the first evaluation that counts."""
        counted = self._counted()
        return min(counted, key=lambda entry: entry[1])[0] if counted else None

    def look(self, classifier) -> None:
        """After an evaluation: keep this adapter if it is the best so far."""
        if self.wanted and self.step == self.progress.step:
            with self.backend.whole(classifier) as whole:
                on_main(self.backend.accelerator, lambda: save_adapter(whole, self.folder))

    def exhausted(self) -> bool:
        """Whether the last `early_stopping_patience` evaluations that count have all been worse than the best."""
        patience = self.settings.early_stopping_patience
        return patience is not None and sum(step > self.step for step, _ in self._counted()) >= patience

    def restore(self, classifier) -> int:
        """Give the model the best adapter.

        Returns:
            The step that the model's adapter is of now: the last one where none was kept.
        """
        if not self.wanted or self.step is None:
            return self.progress.step
        with self.backend.whole(classifier, changed=True) as whole:
            load_weights(whole, self.folder)
        return self.step

    def _counted(self) -> list[tuple[int, float]]:
        """(step, mean dev loss over the tasks) of the evaluations that count."""
        found = []
        for entry in self.progress.dev:
            losses = [value for key, value in entry.items() if key.endswith("/loss")]
            if self.settled(entry["step"]) and entry["step"] >= self._first:
                loss = sum(losses) / len(losses)
                found.append((entry["step"], math.inf if math.isnan(loss) else loss))
        return found
