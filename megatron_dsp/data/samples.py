"""What a source of samples is, and how one is divided into training and validation."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from megatron_dsp.data.data_error import DataError


class Shape(NamedTuple):
    """The size of a sample. All samples of one shape are a bucket; an image has one frame."""

    frames: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self))}]"


class Samples(Protocol):
    """Samples that can be read in any order and frame by frame: pixels or latents, with conditioning tokens.

    Reading changes nothing, and gives the same on every rank. All samples have equally many channels.
    """

    @property
    def conditioning_tokens(self) -> int:
        """How many conditioning tokens each sample has, the missing ones included: L, at least 1."""

    @property
    def conditioning_width(self) -> int:
        """The width of a conditioning token: D."""

    def __len__(self) -> int: ...

    def shape(self, index: int) -> Shape:
        """The size of a sample. It is asked for often and reads nothing."""

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Frames ``start`` to ``stop`` of a sample, floating point ``[stop - start, channels, height, width]``."""

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Its tokens, float32 ``[L, D]``, and which of them are there, bool ``[L]``; the others are 0."""


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, as a source: sample ``i`` of it is ``samples[indices[i]]``."""

    samples: Samples
    indices: list[int]

    @property
    def conditioning_tokens(self) -> int:
        return self.samples.conditioning_tokens

    @property
    def conditioning_width(self) -> int:
        return self.samples.conditioning_width

    def __len__(self) -> int:
        return len(self.indices)

    def shape(self, index: int) -> Shape:
        return self.samples.shape(self.indices[index])

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        return self.samples.read(self.indices[index], start, stop)

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.samples.conditioning(self.indices[index])


def hold_out(samples: Samples, fraction: float) -> tuple[Subset, Subset]:
    """Training samples, and the ``fraction`` of each bucket that is held out for validation; the same at every call.

    Of a bucket of n samples the last ``ceil(fraction * n)`` are held out, but never its only one for training. Raises
    ``DataError`` when no bucket has two.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction={fraction} of the samples cannot be held out: it must be between 0 and 1")
    buckets: dict[Shape, list[int]] = defaultdict(list)
    for index in range(len(samples)):
        buckets[samples.shape(index)].append(index)
    training: list[int] = []
    validation: list[int] = []
    for bucket in buckets.values():
        kept = max(1, len(bucket) - math.ceil(fraction * len(bucket)))
        training += bucket[:kept]
        validation += bucket[kept:]
    if not validation:
        raise DataError(
            f"none of {len(samples)} samples can be held out: each is the only one of its shape; give more samples, or "
            "others for validation"
        )
    return Subset(samples, sorted(training)), Subset(samples, sorted(validation))


def padded_conditioning(text: torch.Tensor, mask: torch.Tensor, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A text ``[l, width]`` and its mask ``[l]`` as every source gives them: float32 ``[tokens, width]``, bool ``[tokens]``.

    What the mask leaves out becomes 0, whatever the encoder left there.
    """
    padded, there = torch.zeros(tokens, width), torch.zeros(tokens, dtype=torch.bool)
    there[: len(mask)] = mask
    padded[: len(text)] = text
    return padded.masked_fill_(~there[:, None], 0), there
