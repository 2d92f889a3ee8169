"""What training steps take: time, FLOPs, what the sequence group moves, memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]
import torch
import torch.distributed as dist

from megatron_dsp.mesh import Mesh
from megatron_dsp.reshard import ledger
from megatron_dsp.reshard.switch_timer import SwitchTimer, time_switches


@dataclass(frozen=True)
class Measured:
    """Means over the training steps of an interval. Where ranks differ, the most of any rank.

    Attributes:
        seconds: of an iteration, without validation, checkpoints and other measurements.
        tflops: 10^12 FLOPs of the model a second and device, forward and backward.
        utilisation: ``tflops`` over what the device can reach (MFU, PaLM, arXiv 2204.02311, appendix B); None: not known.
        switch_seconds: a step, that compute begins switches and waits for them (`SwitchTimer`).
        switch_bytes: a step, that a rank sends in switches, forward and backward.
        sequence_bytes: a step, that a rank sends in all collectives of the sequence group.
        memory: bytes, now and at most since the start, under the names of `memory`.
    """

    seconds: float
    tflops: float
    utilisation: float | None
    switch_seconds: float
    switch_bytes: float
    sequence_bytes: float
    memory: dict[str, float]


class Meter:
    """Measures training steps, interval by interval, on every rank, which all make it together.

    ``peak_tflops``: what a device can reach; None: not known.
    """

    def __init__(self, mesh: Mesh, peak_tflops: float | None):
        self._mesh, self._peak = mesh, peak_tflops
        self._group = mesh.group("sequence")
        self._switches = SwitchTimer(mesh.device)
        self.all_switch_bytes = self.all_sequence_bytes = 0  # of this rank
        dist.barrier()  # else who comes first would seem to wait for switches longer than an iteration takes
        self._begin()

    def _begin(self) -> None:
        self.steps = self._flops = self._switch_bytes = self._sequence_bytes = 0
        self._start = time.perf_counter()

    @contextmanager
    def step(self, forward_flops: int) -> Iterator[None]:
        """The block is a training step; ``forward_flops`` are those of this data rank's micro-batches."""
        with time_switches(self._group, self._switches), ledger() as moved:
            yield
        self._switches.collect()
        rows = [row for row in moved.rows if row.group == self._group.group_desc]
        self._switch_bytes += sum(row.bytes for row in rows if row.operation.is_switch)
        self._sequence_bytes += sum(row.bytes for row in rows)
        self._flops += forward_flops
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time of the block does not count. Waits for the device at its begin and end, and for all ranks at its end."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        dist.barrier()
        self._start += time.perf_counter() - start

    def read(self) -> Measured:
        """The means since the last call, after at least one step; collective over all ranks. Waits for the device."""
        self._wait()
        seconds = (time.perf_counter() - self._start) / self.steps
        now = memory(self._mesh.device)
        most = torch.tensor(
            [self._switches.take(), self._switch_bytes, self._sequence_bytes, *now.values()], dtype=torch.float64
        )
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        switch_seconds, switch_bytes, sequence_bytes, *memories = most.tolist()
        # Every rank counts all FLOPs of its data rank, whose work the other axes divide; backward takes twice the forward's.
        flops = torch.tensor(float(self._flops), dtype=torch.float64)
        dist.all_reduce(flops)
        sharing = dist.get_world_size() // self._mesh.size("data")
        tflops = 3 * flops.item() / sharing / dist.get_world_size() / self.steps / seconds / 1e12
        measured = Measured(
            seconds=seconds,
            tflops=tflops,
            utilisation=None if self._peak is None else tflops / self._peak,
            switch_seconds=switch_seconds / self.steps,
            switch_bytes=switch_bytes / self.steps,
            sequence_bytes=sequence_bytes / self.steps,
            memory=dict(zip(now, memories, strict=True)),
        )
        self.all_switch_bytes += self._switch_bytes
        self.all_sequence_bytes += self._sequence_bytes
        self._begin()
        return measured

    def _wait(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)


def memory(device: torch.device) -> dict[str, float]:
    """Bytes of this rank: of torch's allocator on CUDA, under Megatron's names; on the CPU, of the process in RAM."""
    if device.type == "cuda":
        return {
            "mem-reserved-bytes": torch.cuda.memory_reserved(device),
            "mem-allocated-bytes": torch.cuda.memory_allocated(device),
            "mem-max-allocated-bytes": torch.cuda.max_memory_allocated(device),
        }
    return {
        "mem-resident-bytes": psutil.Process().memory_info().rss,
        "mem-max-resident-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def peak_memory(device: torch.device) -> float:
    """The most bytes that this rank has had since its start: of torch's allocator on CUDA, of the process on the CPU."""
    return next(size for name, size in memory(device).items() if name.startswith("mem-max"))
