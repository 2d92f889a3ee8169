"""What a run shows: Megatron's log line, a progress bar on a terminal, TensorBoard. Rank 0 shows, the others are silent."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingLog:
    """Log lines in a file, and below them a progress bar on a terminal. Use it in a ``with`` block."""

    def __init__(self, *, rank: int, total: int, tensorboard: Path | None = None):
        self._shows = rank == 0
        self._total = total
        self._bar: Progress | None = None
        self._writer: Any = None
        if self._shows and sys.stdin.isatty() and sys.stdout.isatty():  # mpirun gives its ranks a terminal for stdout alone
            self._bar = Progress(
                TextColumn("iteration"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total)
        if self._shows and tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard))

    def __enter__(self) -> TrainingLog:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def message(self, text: str) -> None:
        """Show a line."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self._shows:
            print(text, flush=True)

    def advance(self, iteration: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration)

    def iteration(
        self, iteration: int, *, consumed_samples: int, milliseconds: float, batch: int, values: dict[str, float]
    ) -> None:
        """Show Megatron's line for an iteration, and write its values to TensorBoard.

        ``values`` has "loss" and "learning rate", and may have "grad norm", "loss scale" and others.
        """
        parts = [
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{self._total:8d}",
            f" consumed samples: {consumed_samples:12d}",
            f" elapsed time per iteration (ms): {milliseconds:.1f}",
            f" global batch size: {batch:5d}",
            *(f" {name}: {value:.6E}" for name, value in values.items()),
        ]
        self.message(" |".join(parts) + " |")
        if self._bar is not None:
            self._bar.update(self._task, description=f"loss {values['loss']:.4f}")
        self.scalars(iteration, {**values, "iteration time (ms)": milliseconds, "batch size": batch})

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Write values to TensorBoard, under Megatron's kind of tags (``grad-norm``)."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name.replace(" ", "-"), value, iteration)
