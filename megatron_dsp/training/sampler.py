"""Which samples a rank reads."""

from __future__ import annotations

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
