"""Random draws that are functions of what they are for, never of what was drawn before.

Each draw has its own position in the counter space of ``numpy.random.Philox``: the key is (seed, purpose), the counter
(sample, frame). A sample is a position in the endless stream of training samples, so a resumed run draws what the
uninterrupted one would have, and a rank draws the noise of its own frames only and yet gets, bit by bit, its part of
what one process would draw for the whole clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch


class _Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent. The values are part of every result."""

    NOISE = 0
    TIMESTEP = 1
    DROP = 2
    CONDITIONED_FRAMES = 3
    ORDER = 4
    FEATURES = 5
    BATCHES = 6


def _generator(purpose: _Purpose, seed: int, sample: int = 0, frame: int = 0) -> np.random.Generator:
    for name, value in (("seed", seed), ("sample", sample), ("frame", frame)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} cannot be drawn for: it must be in 0 .. 2**64 - 1")
    key = np.array([seed, purpose], dtype=np.uint64)
    # The first word counts the numbers of this draw itself.
    counter = np.array([0, frame, sample, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability={probability} must be in 0 .. 1")


def noise(seed: int, sample: int, frames: range, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for some frames of a sample: float32 ``[len(frames), *shape]``, each frame on its own."""
    drawn = np.empty((len(frames), *shape), dtype=np.float32)
    for frame, out in zip(frames, drawn, strict=True):
        _generator(_Purpose.NOISE, seed, sample, frame).standard_normal(out=out, dtype=np.float32)
    return torch.from_numpy(drawn)


def timestep(seed: int, sample: int) -> float:
    """How noisy a sample is, in (0, 1), 1 being noise alone: logit-normal, as Stable Diffusion 3 trains with."""
    return 1 / (1 + math.exp(-_generator(_Purpose.TIMESTEP, seed, sample).standard_normal()))


def drop(seed: int, sample: int, probability: float) -> bool:
    """Whether a sample is trained on without its conditioning (for classifier-free guidance)."""
    _check_probability(probability)
    return _generator(_Purpose.DROP, seed, sample).random() < probability


def conditioned_frames(seed: int, sample: int, total: int, probability: float) -> int:
    """How many leading frames of ``total`` stay clean, so that the model learns to continue an image or a video.

    With ``probability`` it is one of 1 .. ``total - 1``, all equally likely; otherwise, and always of one frame, 0.
    """
    _check_probability(probability)
    generator = _generator(_Purpose.CONDITIONED_FRAMES, seed, sample)
    if total < 2 or generator.random() >= probability:
        return 0
    return int(generator.integers(1, total))


def features(seed: int, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal features of a thing that ``seed`` stands for: float32 ``[*shape]``."""
    return torch.from_numpy(_generator(_Purpose.FEATURES, seed).standard_normal(shape, dtype=np.float32))


def shift_timestep(timestep: float, tokens: int, base_tokens: int | None) -> float:
    """A diffusion time, 1 being noise alone, moved towards noise for a sample of more tokens than ``base_tokens``.

    The more tokens show a thing, the more noise it takes to hide it: ``a t / (1 + (a - 1) t)`` with
    ``a = sqrt(tokens / base_tokens)`` (Stable Diffusion 3, Esser et al., arXiv 2403.03206, section 5.3.2). With fewer
    tokens it moves towards clean; with ``base_tokens`` None it stays.
    """
    if base_tokens is None:
        return timestep
    if tokens < 1 or base_tokens < 1:
        raise ValueError(f"tokens={tokens} and base_tokens={base_tokens} must be >= 1 to shift a timestep by their ratio")
    scale = math.sqrt(tokens / base_tokens)
    return scale * timestep / (1 + (scale - 1) * timestep)


class SampleOrder:
    """The endless stream of samples over ``size`` things: ``order[position]`` is the index of the one at a position.

    Positions ``e * size`` to ``(e + 1) * size`` are epoch ``e``, which visits each thing once in an order of its own.
    Other seeds have other orders, and so have other ``stream`` numbers.
    """

    def __init__(self, size: int, seed: int, stream: int = 0) -> None:
        if size < 1:
            raise ValueError(f"an order of size={size} samples has none to give: size must be >= 1")
        self._size, self._seed, self._stream = size, seed, stream
        # Only saves time. Two: batches of the next epoch are made ahead while this one's are asked for.
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def __getitem__(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"no sample at position={position}: it must be >= 0")
        epoch, place = divmod(position, self._size)
        return int(self._permutation(epoch)[place])

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return _generator(_Purpose.ORDER, self._seed, epoch, self._stream).permutation(self._size)


def batch_order(batches: int, seed: int, round_number: int) -> np.ndarray:
    """The order of a round's ``batches`` global batches, a permutation of their numbers: int64 ``[batches]``."""
    return _generator(_Purpose.BATCHES, seed, round_number).permutation(batches)
