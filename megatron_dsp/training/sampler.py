"""Which samples a rank reads, and with which random numbers it works."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from megatron_dsp.mesh import Mesh


def sampler(
    dataset: Dataset, mesh: Mesh, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
) -> DistributedSampler:
    """torch's DistributedSampler over the data axis: the ranks of one sequence group get the same samples."""
    return DistributedSampler(
        dataset,
        num_replicas=mesh.size("data"),
        rank=mesh.rank("data"),
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
    )


def seed(mesh: Mesh, seed: int) -> None:
    """Seed torch's default generators: equal where ranks hold copies (tensor), different where they hold parts.

    Parts are the samples of the data axis, the shards of the sequence axis and the layers of the pipe axis. Call it after
    the model was made: its initial weights must be equal on all data and sequence ranks.
    """
    parts = [mesh.rank(axis) for axis in ("pipe", "data", "sequence")]
    torch.manual_seed(int(np.random.SeedSequence([seed, *parts]).generate_state(1, np.uint64)[0] >> 1))
