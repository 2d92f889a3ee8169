"""The video transformer at work: its model on a mesh, its loss on the frames that a rank holds, and sampling.

Everything here takes batches of one bucket each, of any frames, height and width.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_dsp.data import BatchesAhead, BatchRequest, VideoBatch, VideoBatches
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.mesh import Mesh
from megatron_dsp.models.embeddings import grid_size, unpatchify
from megatron_dsp.models.flops import forward_flops
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import gather
from megatron_dsp.reshard.labels import profile_range
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training import rectified_flow
from megatron_dsp.training.checkpointing import load_weights
from megatron_dsp.training.loop import MicroBatch

_AHEAD = 2  # micro-batches that are made before they are asked for: one may take longer than a step


class VideoDiffusion:
    """Rectified flow on video, each rank on its own frames: a `loop.Workload`.

    Args:
        model: the sizes of the model.
        mesh: its sequence group holds the frames.
        backend: as of `VideoDiT.forward`.
        training, validation: where samples come from; positions are in their streams.
    """

    def __init__(
        self, model: VideoDiTConfig, mesh: Mesh, backend: str, *, training: VideoBatches, validation: VideoBatches
    ) -> None:
        self.model, self.backend, self.training, self.validation = model, backend, training, validation
        self._group, self._data_ranks = mesh.group("sequence"), mesh.size("data")
        self._ahead = BatchesAhead(mesh.device)

    def loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        """The loss of training samples."""
        return self._loss(model, self.training, samples)

    def validation_loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        """The loss of validation samples."""
        return self._loss(model, self.validation, samples)

    def micro_batch(self, samples: list[int], validation: bool) -> MicroBatch:
        """Inputs and labels for a pipeline, whose loss is `pipeline_loss`."""
        return self._inputs_and_labels(self.validation if validation else self.training, samples)

    def pipeline_loss(self, patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """The loss of a pipeline's output tokens."""
        return self._velocity_loss(unpatchify(patches, self.model.patch, labels[0].shape), labels)

    def forward_flops(self, samples: list[int]) -> int:
        """The FLOPs of a forward pass over training samples, whole ones."""
        frames, _, height, width = self.training.shape(samples)
        return forward_flops(
            self.model,
            frames=frames,
            height=height,
            width=width,
            conditioning_tokens=self.training.samples.conditioning_tokens,
            batch=len(samples),
        )

    def sample(self, model: nn.Module, samples: list[int], *, steps: int, given: int, guidance: float = 1.0) -> Tensor:
        """Whole clips [T, B, C, H, W], on every rank, sampled from the noise and the conditioning of validation samples.

        Args:
            model: `VideoDiT`, or an engine of it; in eval mode.
            samples: positions of validation samples, of one bucket.
            steps: Euler steps.
            given: leading token frames that are taken from the samples.
            guidance: scale of classifier-free guidance; other than 1, the model runs twice a step.
        """
        batch, patch = self._batch(self.validation, samples), self.model.patch
        frames = self._frames(self.validation, samples)
        total, _, height, width = self.validation.shape(samples)

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            run = partial(model, x, timesteps, batch.conditioning, batch.conditioning_mask)
            everywhere = torch.ones_like(batch.conditioning_drop)
            where = {"group": self._group, "backend": self.backend}
            return rectified_flow.guided(lambda conditioned: run(None if conditioned else everywhere, **where), guidance)

        token_frames = math.ceil(total / patch[0])
        tokens = token_frames * math.prod(grid_size(height, width, patch))
        times = rectified_flow.euler_times(steps, tokens, self.validation.timestep_base_tokens)
        x = rectified_flow.sample(velocity, batch.noise, batch.video, given, token_frames, patch[0], frames, times)
        return self._whole(x, total)

    def real(self, samples: list[int]) -> Tensor:
        """Validation samples themselves, [T, B, C, H, W], on every rank."""
        return self._whole(self._batch(self.validation, samples).video, self.validation.shape(samples)[0])

    def _batch(self, batches: VideoBatches, samples: list[int]) -> VideoBatch:
        with profile_range("data"):
            following = [self._request(batches, later) for later in self._later(samples)] if batches is self.training else None
            return self._ahead.take(self._request(batches, samples), following)

    def _request(self, batches: VideoBatches, samples: list[int]) -> BatchRequest:
        return BatchRequest(batches, tuple(samples), self._frames(batches, samples))

    def _later(self, samples: list[int]) -> list[list[int]]:
        """The next micro-batches of this data rank in training, where data ranks take theirs in turn."""
        stride, size = len(samples) * self._data_ranks, self.training.global_batch_size
        later = [[position + number * stride for position in samples] for number in range(1, 1 + _AHEAD)]
        # Of two global batches, samples may not stack: then the caller takes them in another way.
        return [positions for positions in later if positions[0] // size == positions[-1] // size]

    def _frames(self, batches: VideoBatches, samples: list[int]) -> range:
        """This rank's raw frames of samples: those of its token frames."""
        total, depth = batches.shape(samples)[0], self.model.patch[0]
        start, stop = shard_range(math.ceil(total / depth), self._group.size(), self._group.rank())
        return range(start * depth, min(stop * depth, total))

    def _loss(self, model: nn.Module, batches: VideoBatches, samples: list[int]) -> Tensor:
        inputs, labels = self._inputs_and_labels(batches, samples)
        return self._velocity_loss(model(*inputs, group=self._group, backend=self.backend), labels)

    def _inputs_and_labels(self, batches: VideoBatches, samples: list[int]) -> MicroBatch:
        batch, own = self._batch(batches, samples), self._frames(batches, samples)
        every = rectified_flow.frame_times(batch.timesteps, self.model.patch[0], range(batches.shape(samples)[0]))
        times = every[own.start : own.stop]
        noisy = rectified_flow.add_noise(batch.video, batch.noise, times)
        conditioning = batch.conditioning, batch.conditioning_mask, batch.conditioning_drop
        labels = batch.noise - batch.video, rectified_flow.frame_weights(times, every)
        return (noisy, batch.timesteps, *conditioning), labels

    def _velocity_loss(self, velocity: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        target, weights = labels
        return rectified_flow.velocity_loss(velocity, target, weights, self._group)

    def _whole(self, frames: Tensor, total: int) -> Tensor:
        """All frames, from each rank's. Token frames are what is sharded, so frames are gathered by token frame."""
        depth = self.model.patch[0]
        missing = -len(frames) % depth
        padded = torch.cat([frames, frames.new_zeros(missing, *frames.shape[1:])])
        tokens = padded.unflatten(0, (-1, depth)) if len(padded) else padded.unsqueeze(1).expand(-1, depth, *padded.shape[1:])
        return gather(tokens, dim=0, size=math.ceil(total / depth), group=self._group).flatten(0, 1)[:total]


def make_model(
    config: VideoDiTConfig,
    mesh: Mesh,
    workload: VideoDiffusion,
    *,
    sequence_parallel: bool = False,
    recompute: bool = False,
    partition: str = "parameters",
) -> nn.Module:
    """The model on the tensor and pipe axes of a mesh; the flags are Megatron's, ``partition`` DeepSpeed's partition_method."""
    tensor = TensorParallel(
        mesh.group("tensor"), sequence_dim=2 if sequence_parallel else None, shares_switches=mesh.within_host("tensor")
    )
    if mesh.size("pipe") == 1:
        return VideoDiT(config, tensor=tensor, recompute=recompute)
    from megatron_dsp.pipeline import PipelinedVideoDiT  # imports DeepSpeed, which takes seconds

    return PipelinedVideoDiT(
        config,
        mesh,
        workload.pipeline_loss,
        partition=partition,
        tensor=tensor,
        backend=workload.backend,
        recompute=recompute,
    )


def load_model(config: VideoDiTConfig, mesh: Mesh, folder: Path, *, ema: bool, bf16: bool) -> VideoDiT:
    """The model with the weights of the latest checkpoint in ``folder``, to evaluate; ``ema``: with their moving average.

    The degree of the sequence axis is free, that of the tensor axis the checkpoint's. Errors: UsageError where they are not
    there or do not fit, and for pipe > 1.
    """
    if mesh.size("pipe") > 1:
        raise UsageError(f"pipe={mesh.size('pipe')}: evaluation runs the whole model on every rank; use pipe 1")
    model = VideoDiT(config, tensor=TensorParallel(mesh.group("tensor"), shares_switches=mesh.within_host("tensor")))
    load_weights(model, folder, mesh, ema=ema)
    return model.to(mesh.device, torch.bfloat16 if bf16 else torch.float32).eval()
