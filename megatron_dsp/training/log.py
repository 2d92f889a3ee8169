"""What a run shows: Megatron's log line, a progress bar on a terminal, DeepSpeed's monitors. All of it on rank 0 alone."""

from __future__ import annotations

import sys
from datetime import datetime
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.monitor import Measured


class TrainingLog:
    """Log lines in a file, and below them a progress bar on a terminal. Use it in a ``with`` block.

    ``monitor`` is that of a DeepSpeed engine, which writes on rank 0 to what the ds_config enables (docs/monitoring.md).
    """

    def __init__(self, *, rank: int, total: int, monitor: Any):
        self._shows = rank == 0
        self._total = total
        self._monitor = monitor
        self._bar: ProgressBar | None = None
        if self._shows and sys.stdin.isatty() and sys.stdout.isatty():  # mpirun gives its ranks a terminal for stdout alone
            self._bar = ProgressBar(
                TextColumn("iteration"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> TrainingLog:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

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

    def iteration(self, progress: Progress, *, batch: int, values: dict[str, float], measured: Measured) -> None:
        """Show Megatron's line for an iteration, and write its values to the monitors.

        ``values`` has "loss" and "learning rate", and may have "grad norm", "loss scale" and others; ``batch`` is in samples.
        """
        utilisation = {} if measured.utilisation is None else {"mfu": measured.utilisation}
        memory = next(name for name in measured.memory if name.startswith("mem-max"))
        parts = [
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {progress.iteration:8d}/{self._total:8d}",
            f" consumed samples: {progress.consumed_samples:12d}",
            f" elapsed time per iteration (ms): {1000 * measured.seconds:.1f}",
            f" throughput per GPU (TFLOP/s/GPU): {measured.tflops:.1f}",
            *(f" MFU: {value:.1%}" for value in utilisation.values()),
            f" global batch size: {batch:5d}",
            *(f" {name}: {value:.6E}" for name, value in values.items()),
            f" switch time (ms): {1000 * measured.switch_seconds:.1f}",
            f" peak memory (MiB): {measured.memory[memory] / 2**20:.1f}",
        ]
        self.message(" |".join(parts) + " |")
        if self._bar is not None:
            self._bar.update(self._task, description=f"loss {values['loss']:.4f}")
        self.scalars(
            progress,
            {
                **values,
                "batch size": batch,
                "consumed samples": progress.consumed_samples,
                "iteration time": measured.seconds,
                "throughput": measured.tflops,
                **utilisation,
                "switch time": measured.switch_seconds,
                "switch bytes": measured.switch_bytes,
                "sequence bytes": measured.sequence_bytes,
                **measured.memory,
            },
        )

    def times(self, progress: Progress, times: dict[str, tuple[float, float]]) -> None:
        """Show the least and the most seconds of any rank as Megatron shows its timers, and write the most to the monitors."""
        rows = (f"\n    {f'{name} ':.<48}: ({1000 * least:.2f}, {1000 * most:.2f})" for name, (least, most) in times.items())
        self.message(f" (min, max) time across ranks (ms) at iteration {progress.iteration}:{''.join(rows)}")
        self.scalars(progress, {f"{name} time": most for name, (_, most) in times.items()})

    def scalars(self, progress: Progress, values: dict[str, float]) -> None:
        """Write values to the monitors, under Megatron's kind of tags (``grad-norm``), at the iteration reached."""
        if self._shows and self._monitor.enabled:
            # Weights & Biases drops what comes at an earlier step than it saw last, and DeepSpeed's own steps are in samples.
            by_samples = self._monitor.wandb_monitor is not None
            step = progress.consumed_samples if by_samples else progress.iteration
            self._monitor.write_events([(name.replace(" ", "-"), value, step) for name, value in values.items()])
