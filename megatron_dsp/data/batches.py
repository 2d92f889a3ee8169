"""Batches for video diffusion: pure functions of sample positions and of the frames that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial

import torch

from megatron_dsp.data import draws
from megatron_dsp.data.buckets import BucketOrder
from megatron_dsp.data.samples import Samples, Shape
from megatron_dsp.errors import UsageError


@dataclass(frozen=True)
class VideoBatch:
    """``B`` samples on one rank, which holds ``T_r`` of their ``T`` raw frames; only the first two are sharded.

    A token frame is as many raw frames as the model makes one token of, so there are ``T_tokens = ceil(T / patch[0])``.
    Conditioning is what a text encoder gives: ``L`` tokens of width ``D``.
    """

    video: torch.Tensor  # float32 [T_r, B, C, height, width], pixels in -1 .. 1 or latents
    noise: torch.Tensor  # float32 [T_r, B, C, height, width], standard normal
    timesteps: torch.Tensor  # float32 [T_tokens, B], in (0, 1), 1 being noise alone; 0 for clean frames
    conditioning: torch.Tensor  # float32 [B, L, D], 0 where the mask is False
    conditioning_mask: torch.Tensor  # bool [B, L], which tokens are there
    conditioning_drop: torch.Tensor  # bool [B], which samples are trained on without conditioning

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> VideoBatch:
        """The same batch on another device; ``non_blocking`` as of `torch.Tensor.to`."""
        return VideoBatch(
            **{field.name: getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)}
        )


@dataclass(frozen=True, kw_only=True, eq=False)  # one object is one stream, whatever is in it
class VideoBatches:
    """Makes the batch of any samples and any frames of them, whatever was made before and on whichever rank.

    Samples are asked for by their positions in the endless stream that ``BucketOrder`` describes. So a run resumes at any
    sample: what it needs to know is the position.
    """

    samples: Samples
    global_batch_size: int  # samples of one optimizer step, which are of one bucket
    seed: int  # of the order of the samples and of everything that is drawn
    patch: tuple[int, int, int]  # raw frames, rows and columns of a token
    drop_probability: float  # how many samples lose their conditioning
    clean_frame_probability: float  # how many samples keep some leading token frames clean
    timestep_base_tokens: int | None = None  # as of draws.shift_timestep, by the tokens of a sample

    def __post_init__(self) -> None:
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise UsageError(f"patch={self.patch} must be three numbers >= 1: frames, rows and columns of a token")
        for name in ("drop_probability", "clean_frame_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} must be in 0 .. 1")
        for name in ("global_batch_size", "timestep_base_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be >= 1")

    @cached_property
    def _order(self) -> BucketOrder:
        shapes = map(self.samples.shape, range(len(self.samples)))
        return BucketOrder(shapes, global_batch_size=self.global_batch_size, seed=self.seed)

    def shape(self, positions: Sequence[int]) -> Shape:
        """The one size of the samples at these positions.

        Raises ``ValueError`` when they are of several buckets, which the positions of one global batch never are.
        """
        if not positions:
            raise ValueError("a batch of no samples: give at least one sample position")
        shapes = [self.samples.shape(self._order[position]) for position in positions]
        for position, shape in zip(positions, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"samples {positions[0]} and {position} have shapes {shapes[0]} and {shape}, which do not stack: take all "
                    f"samples of a batch from one global batch, that of positions k * {self.global_batch_size} to "
                    f"(k + 1) * {self.global_batch_size}"
                )
        return shapes[0]

    def empty(self, positions: Sequence[int], frames: range, *, pin_memory: bool = False) -> VideoBatch:
        """Memory for ``batch(positions, frames)``, as of `torch.empty`."""
        new, shape, count = partial(torch.empty, pin_memory=pin_memory), self.shape(positions), len(positions)
        tokens, width = self.samples.conditioning_tokens, self.samples.conditioning_width
        return VideoBatch(
            video=new(len(frames), count, *shape[1:]),
            noise=new(len(frames), count, *shape[1:]),
            timesteps=new(math.ceil(shape.frames / self.patch[0]), count),
            conditioning=new(count, tokens, width),
            conditioning_mask=new(count, tokens, dtype=torch.bool),
            conditioning_drop=new(count, dtype=torch.bool),
        )

    def batch(self, positions: Sequence[int], frames: range, into: VideoBatch | None = None) -> VideoBatch:
        """The samples at these positions, with the raw frames ``frames`` of each: a part of ``0 .. shape(positions).frames``.

        Only these frames are read; a rank that holds none gives an empty range. The batch is ``into``, memory of `empty`,
        or new.
        """
        if frames.step != 1:
            raise ValueError(f"a rank holds consecutive frames, not {frames}: its step must be 1")
        shape = self.shape(positions)
        video, conditioning, masks = [], [], []
        for index in map(self._order.__getitem__, positions):
            if frames:
                video.append(self.samples.read(index, frames.start, frames.stop).float())
            else:
                video.append(torch.empty(0, *shape[1:]))
            tokens, mask = self.samples.conditioning(index)
            conditioning.append(tokens)
            masks.append(mask)
        noise = [draws.noise(self.seed, position, frames, shape[1:]) for position in positions]
        timesteps = [self._timesteps(position, shape) for position in positions]
        drops = [draws.drop(self.seed, position, self.drop_probability) for position in positions]
        batch = self.empty(positions, frames) if into is None else into
        torch.stack(video, dim=1, out=batch.video)
        torch.stack(noise, dim=1, out=batch.noise)
        torch.stack(timesteps, dim=1, out=batch.timesteps)
        torch.stack(conditioning, out=batch.conditioning)
        torch.stack(masks, out=batch.conditioning_mask)
        batch.conditioning_drop.copy_(torch.tensor(drops))
        return batch

    def _timesteps(self, position: int, shape: Shape) -> torch.Tensor:
        token_frames, *grid = (
            math.ceil(size / patch) for size, patch in zip((shape.frames, shape.height, shape.width), self.patch, strict=True)
        )
        clean = draws.conditioned_frames(self.seed, position, token_frames, self.clean_frame_probability)
        tokens = token_frames * math.prod(grid)
        timestep = draws.shift_timestep(draws.timestep(self.seed, position), tokens, self.timestep_base_tokens)
        timesteps = torch.full((token_frames,), timestep, dtype=torch.float32)
        timesteps[:clean] = 0
        return timesteps
