"""The training loop: iterations of micro-batches through a DeepSpeed engine, with everything that goes with them."""

from __future__ import annotations

import argparse
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsp.mesh import Mesh
from megatron_dsp.reshard import ledger
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.exposed import exposed_seconds
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.log import TrainingLog

MicroBatch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


class Workload(Protocol):
    """What the loop must know of a model and its data.

    A sample is a position in an endless stream. All ranks of a sequence group are asked for the same positions, and their
    losses are averaged over data x sequence (``dsp.mean_loss`` gives such a loss).
    """

    def loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        """The loss of training samples."""

    def validation_loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        """The loss of validation samples."""

    def micro_batch(self, samples: list[int], validation: bool) -> MicroBatch:
        """The same samples for a pipeline, whose model has the loss: its inputs, and the labels."""


def train(engine: Any, workload: Workload, mesh: Mesh, arguments: argparse.Namespace, log: TrainingLog) -> Progress:
    """Train for ``arguments.train_iters`` iterations; return how far it came.

    Iteration i takes samples ``i * global batch ...``, whatever the degrees. Resumes from ``arguments.load``; saves to
    ``arguments.save`` every ``save_interval`` iterations and at the end. On SIGTERM (a scheduler's warning) all ranks
    finish the iteration together, save, and return.
    """
    progress = checkpointing.load(engine, arguments.load, mesh) if arguments.load else Progress()
    if arguments.load:
        log.message(f"resumed from {arguments.load} at iteration {progress.iteration}")
    saved = progress.iteration if arguments.load == arguments.save else None
    started, first = time.perf_counter(), progress.iteration
    interval_loss, interval_start, interval_first = torch.zeros((), device=mesh.device), started, progress.iteration

    switched, overlap, shown = 0, exchange_of(mesh.group("sequence")).overlap, 0

    with _stop_signal() as stop, _trace(arguments, log) as trace_step:
        while progress.iteration < arguments.train_iters:
            trace_step(progress.iteration)
            engine.train()
            learning_rate = engine.get_lr()[0]
            with ledger() as moved:
                interval_loss += _train_step(engine, workload, mesh, progress)
            switched += sum(row.bytes for row in moved.rows if row.operation.startswith("switch"))
            progress.iteration += 1
            progress.consumed_samples += engine.train_batch_size()
            log.advance(progress.iteration)
            for decision in [] if overlap is None else overlap.decisions[shown:]:
                log.message(f"overlap from iteration {progress.iteration} on: {decision}")
                shown += 1
            stopping = _any_rank(stop.received)

            last = stopping or progress.iteration == arguments.train_iters
            if progress.iteration % arguments.log_interval == 0 or last:
                count = progress.iteration - interval_first
                values = {"learning rate": learning_rate, "loss": _average(interval_loss / count, mesh)}
                values |= _engine_values(engine)
                now = time.perf_counter()
                log.iteration(
                    progress.iteration,
                    consumed_samples=progress.consumed_samples,
                    milliseconds=(now - interval_start) * 1000 / count,
                    batch=engine.train_batch_size(),
                    values=values,
                )
                interval_loss.zero_()
                interval_first, interval_start = progress.iteration, now
            interval = arguments.exposed_communication_interval
            if interval and progress.iteration % interval == 0:
                now = time.perf_counter()
                _show_exposed(engine, workload, mesh, progress, log)
                interval_start += time.perf_counter() - now
            if arguments.eval_iters and (progress.iteration % arguments.eval_interval == 0 or last):
                _validate(engine, workload, mesh, arguments.eval_iters, progress, log)
            if arguments.save and arguments.save_interval and progress.iteration % arguments.save_interval == 0:
                saved = _save(engine, mesh, arguments, progress, log)
            if stopping:
                log.message(f"SIGTERM: stopping after iteration {progress.iteration}")
                break

    seconds, iterations = time.perf_counter() - started, progress.iteration - first
    if arguments.save and saved != progress.iteration:
        _save(engine, mesh, arguments, progress, log)
    _summarise(iterations, iterations * engine.train_batch_size(), seconds, switched, mesh, log)
    return progress


def _train_step(engine: Any, workload: Workload, mesh: Mesh, progress: Progress) -> Tensor:
    """One optimizer step; the mean loss of its micro-batches."""
    samples = _micro_batches(engine, mesh, progress.consumed_samples)
    if mesh.size("pipe") > 1:
        # Only the first and the last stage take from it.
        return engine.train_batch(workload.micro_batch(positions, validation=False) for positions in samples)
    total = torch.zeros((), device=mesh.device)
    for positions in samples:
        loss = workload.loss(engine, positions)
        engine.backward(loss)
        engine.step()
        total += loss.detach() / engine.gradient_accumulation_steps()
    return total


def _micro_batches(engine: Any, mesh: Mesh, start: int) -> Iterator[list[int]]:
    """This data rank's sample positions in each micro-batch of the global batch that begins at ``start``."""
    micro, data, rank = engine.train_micro_batch_size_per_gpu(), mesh.size("data"), mesh.rank("data")
    for step in range(engine.gradient_accumulation_steps()):
        first = start + (step * data + rank) * micro
        yield list(range(first, first + micro))


def _validate(engine: Any, workload: Workload, mesh: Mesh, batches: int, progress: Progress, log: TrainingLog) -> None:
    """The loss over the same validation samples each time."""
    engine.eval()
    total, count = torch.zeros((), device=mesh.device), 0
    with torch.no_grad():
        for batch in range(batches):
            positions = _micro_batches(engine, mesh, batch * engine.train_batch_size())
            if mesh.size("pipe") > 1:
                pairs = (workload.micro_batch(samples, validation=True) for samples in positions)
                total += engine.eval_batch(pairs).sum()  # of one element; its shape differs from stage to stage
                count += 1
                continue
            for samples in positions:
                total += workload.validation_loss(engine, samples)
                count += 1
    value = _average(total / count, mesh)
    log.message(f" validation loss at iteration {progress.iteration} | loss: {value:.6E} |")
    log.scalars(progress.iteration, {"validation loss": value})


def _show_exposed(engine: Any, workload: Workload, mesh: Mesh, progress: Progress, log: TrainingLog) -> None:
    """What communication adds to forward and backward of a micro-batch. Weights and their gradients stay as they are."""
    exchange = exchange_of(mesh.group("sequence"))
    overlap, samples = exchange.overlap, next(_micro_batches(engine, mesh, progress.consumed_samples))
    weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
    if overlap is not None and not overlap.decisions:
        exchange.overlap = None  # its trials are of training's passes
    try:
        # Not backward(): it would have DeepSpeed reduce these gradients.
        seconds = exposed_seconds(
            lambda: torch.autograd.grad(workload.loss(engine.module, samples), weights), exchange, mesh.device
        )
    finally:
        exchange.overlap = overlap
    step = seconds.pop("step")
    parts = " | ".join(f"{name}: {1000 * value:.1f}" for name, value in seconds.items())
    log.message(f" exposed communication (ms) of {1000 * step:.1f} at iteration {progress.iteration} | {parts} |")
    log.scalars(progress.iteration, {f"exposed {name} (ms)": 1000 * value for name, value in seconds.items()})


def _save(engine: Any, mesh: Mesh, arguments: argparse.Namespace, progress: Progress, log: TrainingLog) -> int:
    checkpointing.save(engine, arguments.save, progress, mesh)
    log.message(f" saved checkpoint at iteration {progress.iteration} to {arguments.save}")
    return progress.iteration


def _average(value: Tensor, mesh: Mesh) -> float:
    """The average over data x sequence, as gradients are averaged. Waits for the device."""
    group = mesh.group("data", "sequence")
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value.item() / group.size()


def _engine_values(engine: Any) -> dict[str, float]:
    """What the engine knows of the last step. In ZeRO stage 0 DeepSpeed reports no gradient norm."""
    values = {}
    norm = engine.get_global_grad_norm()
    if norm is not None:
        values["grad norm"] = float(norm)
    if engine.fp16_enabled():
        values["loss scale"] = float(engine.optimizer.cur_scale)
    return values


class _Stop:
    received = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Note a SIGTERM instead of dying of it."""
    stop = _Stop()

    def note(*_: Any) -> None:
        stop.received = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _trace(arguments: argparse.Namespace, log: TrainingLog) -> Iterator[Callable[[int], None]]:
    """What is given is called before each iteration, with its number; the trace is that of the iterations asked for."""
    profiler: torch.profiler.profile | None = None

    def stop() -> None:
        nonlocal profiler
        if profiler is not None:
            profiler.stop()
            arguments.profile_dir.mkdir(parents=True, exist_ok=True)
            path = arguments.profile_dir / f"rank{dist.get_rank()}.json"
            profiler.export_chrome_trace(str(path))
            log.message(f" wrote {path} and those of the other ranks: open them at https://ui.perfetto.dev")
            profiler = None

    def before(iteration: int) -> None:
        nonlocal profiler
        if iteration == arguments.profile_step_end:
            stop()
        if arguments.profile and iteration == arguments.profile_step_start:
            profiler = torch.profiler.profile()
            profiler.start()

    try:
        yield before
    finally:
        stop()


def _any_rank(flag: bool) -> bool:
    """Whether any rank's flag is set: launchers signal the ranks one after another. On the CPU, without waiting for a GPU."""
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())


def _summarise(iterations: int, samples: int, seconds: float, switched: int, mesh: Mesh, log: TrainingLog) -> None:
    """Samples a second; the most switch bytes a training step and the largest peak memory of any rank."""
    if not iterations:
        return
    most_switched = torch.tensor(float(switched))
    if mesh.device.type == "cuda":
        peak = torch.tensor(float(torch.cuda.max_memory_allocated()))
    else:
        peak = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    dist.all_reduce(most_switched, op=dist.ReduceOp.MAX)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    log.message(
        f"summary: {iterations} iterations in {seconds:.1f} s | samples a second: {samples / seconds:.2f} | "
        f"switch bytes a step and rank: {most_switched.item() / iterations:,.0f} | "
        f"peak memory a rank: {peak.item() / 2**20:,.0f} MiB"
    )
