"""Which samples make a global batch: always samples of one bucket, so that they stack."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from megatron_dsp.data import draws
from megatron_dsp.data.samples import Shape


class BucketOrder:
    """The endless stream of samples of many shapes: ``order[position]`` is the index of the sample at a position.

    Positions ``k * global_batch_size`` to ``(k + 1) * global_batch_size`` are global batch ``k``, whose samples are of one
    bucket: all samples of one shape, images included. In a round a bucket of ``n`` samples has ``ceil(n / global_batch_size)``
    global batches. Rounds mix the batches of all buckets, each in an order of its own. A bucket's batches, one after
    another, are an endless stream of permutations of its samples (``draws.SampleOrder``), so all are seen equally often.
    With one bucket the order is that stream, whatever the batch size.

    Nothing is remembered between positions: the order is a function of the shapes, the batch size and the seed.
    """

    def __init__(self, shapes: Iterable[Shape], *, global_batch_size: int, seed: int) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} must be >= 1")
        every = np.array(list(shapes), dtype=np.int64)
        if every.size == 0:
            raise ValueError("no samples to order: give at least one shape")
        self._global_batch_size, self._seed = global_batch_size, seed
        _, bucket_of, counts = np.unique(every, axis=0, return_inverse=True, return_counts=True)
        grouped = np.argsort(bucket_of.reshape(-1), kind="stable")
        self._members = np.split(grouped, np.cumsum(counts)[:-1])  # the samples of each bucket
        self._streams = [draws.SampleOrder(int(count), seed, stream) for stream, count in enumerate(counts)]
        self._batches = -(-counts // global_batch_size)  # how many each bucket has in a round
        self._round = lru_cache(maxsize=2)(self._draw_round)  # as in draws.SampleOrder

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"no sample at position={position}: it must be >= 0")
        batch, place = divmod(position, self._global_batch_size)
        round_number, batch_in_round = divmod(batch, int(self._batches.sum()))
        bucket, number = self._round(round_number)[batch_in_round].tolist()
        number += round_number * int(self._batches[bucket])
        return int(self._members[bucket][self._streams[bucket][number * self._global_batch_size + place]])

    def _draw_round(self, round_number: int) -> np.ndarray:
        """The bucket of each batch of a round, and its number among that bucket's batches there: ``[batches, 2]``."""
        buckets = np.repeat(np.arange(len(self._batches)), self._batches)
        order = buckets[draws.batch_order(len(buckets), self._seed, round_number)]
        firsts = np.cumsum(self._batches) - self._batches
        numbers = np.empty_like(order)
        numbers[np.argsort(order, kind="stable")] = np.arange(len(order)) - firsts[buckets]
        return np.stack([order, numbers], axis=1)
