"""The video transformer as a DeepSpeed pipeline.

Each part of the model is a layer of the pipeline, so that checkpoints name layers, whatever the degrees. What crosses a
boundary stays in the layout of the part before it: the next stage of the pipeline makes the switch that any model would make
there. DeepSpeed sends floats back as gradients, so side inputs that need one enter every stage's graph, and the rest cross as
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from megatron_dsp import launch
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.models.block_runner import Activations, BlockRunner
from megatron_dsp.models.embeddings import grid_size
from megatron_dsp.models.video_dit import Block, Embedding, Head, part_names, part_seeds, reset_part
from megatron_dsp.models.video_dit_config import VideoDiTConfig, check_inputs
from megatron_dsp.tensor import TensorParallel


def topology(mesh: Mesh) -> PipeModelDataParallelTopology:
    """``mesh`` as DeepSpeed's pipelines see it: their data axis is data x sequence, their model axis tensor."""
    return PipeModelDataParallelTopology(
        num_pp=mesh.size("pipe"), num_mp=mesh.size("tensor"), num_dp=mesh.group("data", "sequence").size()
    )


class PipelinedVideoDiT(PipelineModule):
    """`VideoDiT` over the pipe axis of a mesh, to be trained by ``engine.train_batch`` of ``dsp.deepspeed_initialize``.

    A micro-batch of the engine's iterator is (inputs, labels). Inputs are the tensors of `VideoDiT.forward` in its order,
    with ``conditioning_drop``; ``loss(patches, labels)`` gets this rank's output tokens, [T, B, S, patch channels], and a tuple
    of tensors. A seed gives the same weights as it gives `VideoDiT`.

    Args:
        config: the model's sizes.
        mesh: its pipe, sequence and tensor groups are used.
        loss: a loss to be averaged over data x sequence (``dsp.mean_loss``).
        partition: DeepSpeed's ``partition_method``: "parameters", "uniform" or "type:REGEX".
        tensor, backend, recompute: as of `VideoDiT`.

    Attributes:
        layer_names: what the pipeline's layers are in a `VideoDiT`; checkpoints use them.
    """

    def __init__(
        self,
        config: VideoDiTConfig,
        mesh: Mesh,
        loss: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
        *,
        partition: str = "parameters",
        tensor: TensorParallel | None = None,
        backend: str = "dsp",
        recompute: bool = False,
    ) -> None:
        tensor = TensorParallel() if tensor is None else tensor
        blocks = [(Block, config, over, tensor) for over in config.block_dims]
        parts: list[tuple[Any, ...]] = [(Embedding, config), *blocks, (Head, config)]
        if mesh.size("pipe") > len(parts):
            raise UsageError(f"pipe={mesh.size('pipe')} is more than the {len(parts)} parts of the model; lower it")
        launch.start_deepspeed(mesh.device.type)  # a PipelineModule makes groups
        specs = [_PartSpec(seed, *part) for part, seed in zip(parts, part_seeds(config), strict=True)]
        super().__init__(specs, topology=topology(mesh), loss_fn=loss, partition_method=partition, dynamic_shape=True)
        self.config, self.tensor, self.layer_names = config, tensor, part_names(config)
        self._group = mesh.group("sequence")
        self._runner = BlockRunner(config, tensor, self._group, backend, recompute)
        first, stop = self._local_start, self._local_stop
        self._first = first - 1  # the embedding is no block
        self._is_first, self._is_last = first == 0, stop == len(parts)

    def _count_layer_params(self) -> list[int]:
        with torch.device("meta"):  # DeepSpeed would build the whole model on every rank, layer by layer
            return super()._count_layer_params()

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        """Run this rank's parts on what the stage before it sent; the first stage on a micro-batch's inputs."""
        parts: Sequence[Any] = self.forward_funcs
        if self._is_first:
            video, timesteps, conditioning, mask, drop = inputs
            check_inputs(self.config, self._group, video, timesteps, conditioning, mask, drop)
            embedding, *parts = parts
            entering = embedding(video, timesteps, conditioning, mask, drop)
            entering = entering._replace(x=self.tensor.shard(entering.x))
            h, w = grid_size(video.shape[3], video.shape[4], self.config.patch)
            space = h * w
        else:
            time, modulation, tokens, x, mask, marks = inputs
            entering, space = Activations(x, time, modulation, tokens, mask.bool()), len(marks)
        x = self._runner.run(parts, entering, space=space, first=max(self._first, 0))
        if self._is_last:
            return _WithZeroGradients.apply(x, entering.time, entering.modulation, entering.tokens)
        marks = x.new_zeros(space, dtype=torch.uint8)  # says how many spatial tokens there are, by its length
        # DeepSpeed goes back through the floats one by one and keeps the graph until the last, which frees most. It receives
        # the n-th tensor and the n-th gradient in the same memory, of one dtype: so what has no gradient comes after them.
        sent = entering.time, entering.modulation, entering.tokens, x, entering.mask.byte(), marks
        return tuple(each.contiguous() for each in sent)  # x may be a shard, a view, which NCCL refuses


class _PartSpec(LayerSpec):
    """A part of the model that is made, and initialised from its own seed, on the ranks that run it."""

    def __init__(self, seed: int, part: type[torch.nn.Module], *arguments: Any) -> None:
        super().__init__(part, *arguments)
        self._seed = seed

    def build(self, log: bool = False) -> torch.nn.Module:
        part = super().build(log)
        reset_part(part, self._seed)
        return part


class _WithZeroGradients(torch.autograd.Function):
    """``x``; the others get a gradient of zero from it, as DeepSpeed wants one for all that it sent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = others
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(other) for other in ctx.others)
