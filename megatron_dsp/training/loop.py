"""The training loop: iterations of micro-batches through a DeepSpeed engine, with everything that goes with them."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsp.mesh import Mesh
from megatron_dsp.reshard import overlap_of
from megatron_dsp.reshard.exposed import exposed_seconds
from megatron_dsp.reshard.labels import profile_range
from megatron_dsp.reshard.stages.overlap import whole_stages
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.device_peaks import peak_tflops
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.monitor import Meter, peak_memory
from megatron_dsp.training.stage_timers import StageTimers

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

    def forward_flops(self, samples: list[int]) -> int:
        """The FLOPs of the model's forward pass over training samples, whole ones, whatever part of them is this rank's."""


def train(
    engine: Any, workload: Workload, mesh: Mesh, arguments: argparse.Namespace, log: TrainingLog, ema: EMA | None = None
) -> Progress:
    """Train for ``arguments.train_iters`` iterations; return how far it came.

    Iteration i takes samples ``i * global batch ...``, whatever the degrees. Resumes from ``arguments.load``; saves to
    ``arguments.save`` every ``save_interval`` iterations and at the end. On SIGTERM (a scheduler's warning) all ranks
    finish the iteration and at most one more, save, and return. ``ema`` takes the weights after each step, and goes into
    checkpoints.
    """
    if arguments.save:
        checkpointing.refuse_other_writers(engine)  # now, not after the first save_interval
    progress = Progress()
    if arguments.load:
        kept = {"optimizer": not arguments.no_load_optim, "random_numbers": not arguments.no_load_rng}
        progress = checkpointing.load(engine, arguments.load, mesh, ema, **kept)
    if arguments.load:
        log.message(f"resumed from {arguments.load} at iteration {progress.iteration}")
    saved = progress.iteration if arguments.load == arguments.save else None
    started, first = time.perf_counter(), progress.iteration
    loss_sum = torch.zeros((), device=mesh.device)  # over the steps since the last log line
    meter = Meter(mesh, _peak_tflops(engine, mesh, arguments))
    overlap, shown = overlap_of(mesh.group("sequence")), 0

    with _stop_signal() as stop, _trace(arguments, log) as trace_step:
        while progress.iteration < arguments.train_iters:
            trace_step(progress.iteration)
            any_rank_stops = _ask_all_ranks(stop.received)  # the answer comes while the iteration computes
            engine.train()
            learning_rate = engine.get_lr()[0]
            samples = list(_micro_batches(engine, mesh, progress.consumed_samples))
            timers = StageTimers(mesh.device) if _due(arguments.stage_timers_interval, progress.iteration + 1) else None
            with meter.step(sum(workload.forward_flops(positions) for positions in samples)):
                loss_sum += _train_step(engine, workload, mesh, samples)
                if ema is not None and engine.was_step_applied():
                    ema.update()
            progress.iteration += 1
            progress.consumed_samples += engine.train_batch_size()
            log.advance(progress.iteration)
            if timers is not None:
                with meter.paused():
                    log.times(progress, timers.read())
            for decision in [] if overlap is None else overlap.decisions[shown:]:
                log.message(f"overlap from iteration {progress.iteration} on: {decision}")
                shown += 1
            stopping = any_rank_stops()

            last = stopping or progress.iteration == arguments.train_iters
            if _due(arguments.log_interval, progress.iteration) or last:
                values = {"learning rate": learning_rate, "loss": _average(loss_sum / meter.steps, mesh)}
                values |= _engine_values(engine)
                log.iteration(progress, batch=engine.train_batch_size(), values=values, measured=meter.read())
                loss_sum.zero_()
            if _due(arguments.exposed_communication_interval, progress.iteration):
                with meter.paused():
                    _show_exposed(engine, workload, mesh, progress, log)
            if arguments.eval_iters and (_due(arguments.eval_interval, progress.iteration) or last):
                with meter.paused():
                    _validate(engine, workload, mesh, arguments.eval_iters, progress, log)
            if arguments.save and _due(arguments.save_interval, progress.iteration):
                with meter.paused():
                    saved = _save(engine, mesh, arguments, progress, log, ema)
            if stopping:
                log.message(f"SIGTERM: stopping after iteration {progress.iteration}")
                break

    seconds, iterations = time.perf_counter() - started, progress.iteration - first
    if arguments.save and saved != progress.iteration:
        _save(engine, mesh, arguments, progress, log, ema)
    _summarise(iterations, iterations * engine.train_batch_size(), seconds, meter, mesh, log)
    return progress


def _due(interval: int | None, iteration: int) -> bool:
    """Whether what is done every ``interval`` iterations (0 or None: never) is done at this one."""
    return interval is not None and interval > 0 and iteration % interval == 0


def _peak_tflops(engine: Any, mesh: Mesh, arguments: argparse.Namespace) -> float | None:
    """What a device of this job can reach, where that is known."""
    if arguments.peak_tflops_per_device is not None:
        return arguments.peak_tflops_per_device
    if mesh.device.type != "cuda" or not (engine.bfloat16_enabled() or engine.fp16_enabled()):
        return None
    return peak_tflops(torch.cuda.get_device_name(mesh.device))


def _train_step(engine: Any, workload: Workload, mesh: Mesh, samples: list[list[int]]) -> Tensor:
    """One optimizer step; the mean loss of its micro-batches."""
    if mesh.size("pipe") > 1:
        # Only the first and the last stage take from it.
        return engine.train_batch(workload.micro_batch(positions, validation=False) for positions in samples)
    total = torch.zeros((), device=mesh.device)
    for positions in samples:
        loss = workload.loss(engine, positions)
        engine.backward(loss)
        with profile_range("optimizer step"):
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
    log.scalars(progress, {"validation loss": value})


def _show_exposed(engine: Any, workload: Workload, mesh: Mesh, progress: Progress, log: TrainingLog) -> None:
    """What communication adds to forward and backward of a micro-batch. Weights and their gradients stay as they are."""
    group = mesh.group("sequence")
    overlap, samples = overlap_of(group), next(_micro_batches(engine, mesh, progress.consumed_samples))
    weights = [weight for weight in engine.module.parameters() if weight.requires_grad]
    undecided = overlap is not None and not overlap.decisions  # its trials are of training's passes
    with whole_stages(group) if undecided else nullcontext():
        # Not backward(): it would have DeepSpeed reduce these gradients.
        seconds = exposed_seconds(
            lambda: torch.autograd.grad(workload.loss(engine.module, samples), weights), group, mesh.device
        )
    step = seconds.pop("step")
    parts = " | ".join(f"{name}: {1000 * value:.1f}" for name, value in seconds.items())
    log.message(f" exposed communication (ms) of {1000 * step:.1f} at iteration {progress.iteration} | {parts} |")
    log.scalars(progress, {f"exposed {name} time": value for name, value in seconds.items()})


def _save(engine: Any, mesh: Mesh, arguments: argparse.Namespace, progress: Progress, log: TrainingLog, ema: EMA | None) -> int:
    checkpointing.save(engine, arguments.save, progress, mesh, ema, keep=arguments.keep)
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


def _ask_all_ranks(flag: bool) -> Callable[[], bool]:
    """Begin to ask whether any rank's flag is set: launchers signal the ranks one after another.

    What is returned waits for the answer, which is the same on all ranks. On the CPU, so that no GPU is waited for.
    """
    flags = torch.tensor([int(flag)])
    work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, async_op=True)

    def answer() -> bool:
        work.wait()
        return bool(flags.item())

    return answer


def _summarise(iterations: int, samples: int, seconds: float, meter: Meter, mesh: Mesh, log: TrainingLog) -> None:
    """Samples a second; the most bytes that any rank sends in a training step, and the largest peak memory."""
    if not iterations:
        return
    own = [meter.all_switch_bytes, meter.all_sequence_bytes, peak_memory(mesh.device)]
    most = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    switched, moved, peak = most.tolist()
    log.message(
        f"summary: {iterations} iterations in {seconds:.1f} s | samples a second: {samples / seconds:.2f} | "
        f"switch bytes a step and rank: {switched / iterations:,.0f} | "
        f"sequence-group bytes a step and rank: {moved / iterations:,.0f} | peak memory a rank: {peak / 2**20:,.0f} MiB"
    )
