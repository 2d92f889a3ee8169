"""What to change after a GPU has run out of memory, in figures of the dry run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from megatron_dsp.errors import RankError, UsageError

if TYPE_CHECKING:  # it rests on internals of torch, which a job should not, as long as it runs
    from megatron_dsp.training.dry_run import Job


@contextmanager
def explain_out_of_memory(make_job: Callable[[], Job]) -> Iterator[None]:
    """Errors: RankError, with `suggest`'s words, where the code inside runs out of a GPU's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        capacity = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        # In another process: a dry run has a world of its own, and this one has another.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            suggestion = executor.submit(suggest, make_job(), capacity).result()
        raise RankError(f"{str(error).splitlines()[0]} {suggestion}") from error


def suggest(job: Job, capacity: int) -> str:
    """Which flags would make ``job`` fit into ``capacity`` bytes a rank, by the dry run, on as many ranks."""
    clip = f"{job.frames} frames of {job.height} x {job.width}"
    try:
        known = f"The dry run counts {_in_gib(_most_memory(job))} a rank for {clip}, of {_in_gib(capacity)} that there are."
    except UsageError as error:
        return f"Try --recompute-granularity full, or more ranks on the sequence axis (no dry run: {error})"
    choices = []
    if not job.recompute:
        choices.append(f"--recompute-granularity full ({_in_gib(_most_memory(replace(job, recompute=True)))})")
    found = _find_degree(job, capacity)
    if found is not None:
        choices.append(f"sequence degree {found[0]} ({_in_gib(found[1])})")
    if not choices:
        choices.append("more ranks, for a larger degree of the sequence axis")
    return f"{known} Try {', or '.join(choices)}; --dry-run {job.world_size} beside the job's flags shows what takes how much"


def _find_degree(job: Job, capacity: int) -> tuple[int, int] | None:
    """The smallest larger degree of the sequence axis that fits, by doubling it, and the memory that it takes."""
    degree = 2 * job.config.sequence_parallel.size
    while job.world_size % (degree * job.config.mesh.tensor * job.config.mesh.pipe) == 0:
        sequence_parallel = job.config.sequence_parallel.model_copy(update={"size": degree})
        try:
            memory = _most_memory(replace(job, config=replace(job.config, sequence_parallel=sequence_parallel)))
        except UsageError:  # batch sizes that do not fit to fewer data ranks
            return None
        if memory <= capacity:
            return degree, memory
        degree *= 2
    return None


def _most_memory(job: Job) -> int:
    from megatron_dsp.training.dry_run import dry_run

    return max(costs.total for costs in dry_run(job))


def _in_gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
