"""What a run takes, found on any machine without a job: memory of a rank, and bytes that it sends in a step, by axis.

One rank of each stage of the pipeline runs a micro-batch forward and backward on fake tensors (`fake_world`), so that
activations and collectives are those of the model's own code. What DeepSpeed keeps and sends is arithmetic (`deepspeed_costs`).
docs/dry_run.md says what is counted and how near it is to measured runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dsp.config import Config
from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.mesh import AXES, Mesh, RankGrid
from megatron_dsp.models.block_runner import DIMS
from megatron_dsp.models.embeddings import grid_size, unpatchify
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import ledger
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training import rectified_flow
from megatron_dsp.training.deepspeed_costs import DeepSpeedCosts, StateBytes
from megatron_dsp.training.fake_world import Collective, SavedTensors, Watch, fake_world


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        model: the model's sizes.
        world_size: its ranks.
        config: degrees, batch sizes, ZeRO, precision and the backend of the sequence axis.
        frames, height, width: of a clip, in frames and pixels.
        conditioning_tokens: of a sample.
        sequence_parallel: Megatron's --sequence-parallel.
        recompute: whether blocks are computed again in backward.
        partition: DeepSpeed's partition_method of a pipeline.
        ema: whether an average of the weights is kept.
    """

    model: VideoDiTConfig
    world_size: int
    config: Config
    frames: int
    height: int
    width: int
    conditioning_tokens: int = 4
    sequence_parallel: bool = False
    recompute: bool = False
    partition: str = "parameters"
    ema: bool = False

    @property
    def grid(self) -> RankGrid:
        """How the ranks lie."""
        return RankGrid(self.world_size, **self.config.degrees)

    @property
    def batch_sizes(self) -> tuple[int, int, int]:
        """(global batch, micro-batch, micro-batches of a step)."""
        return self.config.batch_sizes.complete(self.grid.degrees["data"])


@dataclass(frozen=True)
class RankCosts:
    """What one rank takes, in bytes.

    Attributes:
        rank: among all.
        stage: of the pipeline.
        parameters: how many weights it has; with ZeRO 3, has a part of.
        kept: from step to step.
        activations: what forward leaves for backward, inputs and labels with it, of all micro-batches under way at once.
        working: what backward of a micro-batch has at a time beyond that, the gradients of weights aside.
        saved: of ``activations``, what autograd keeps of one micro-batch.
        sent: in a step, by axis; "data" is what is averaged over data x sequence.
        collectives: of one micro-batch, in order.
    """

    rank: int
    stage: int
    parameters: int
    kept: StateBytes
    activations: int
    working: int
    saved: int
    sent: dict[str, int]
    collectives: list[Collective]

    @property
    def total(self) -> int:
        """All memory."""
        return sum(self.kept) + self.activations + self.working


def dry_run(job: Job) -> list[RankCosts]:
    """What the rank with the largest shards takes in each stage of the pipeline, in order.

    Errors: UsageError for a job that could not run, and for what is not known here (`DeepSpeedCosts.of`).
    """
    return [rank_costs(job, int(ranks.flat[0])) for ranks in job.grid.ranks]  # first ranks have the larger shards


def rank_costs(job: Job, rank: int) -> RankCosts:
    """What ``rank`` takes. Errors: as `dry_run`."""
    grid, (_, micro, steps) = job.grid, job.batch_sizes
    costs = DeepSpeedCosts.of(job.config, ema=job.ema)
    stage, pipe = grid.coordinate(rank, "pipe"), grid.degrees["pipe"]
    with fake_world(job.world_size, rank):
        mesh = Mesh(**job.config.degrees)
        part = _WholeModel(job, mesh) if pipe == 1 else _PipelineStage(job, mesh)
        sizes = [parameter.numel() for parameter in part.parameters()]
        with FakeTensorMode(), ledger() as moved:
            _make_fake(part.model, costs.dtype)
            with Watch(part.parameters()) as watch, SavedTensors(part.parameters()) as saved:
                passed = part.forward(micro)
                held, kept_by_autograd = watch.live, saved.live
                passed.backward()
        averaged = mesh.group("data", "sequence").size()
        sent = {axis: steps * moved.by("group").get(axis, (0, 0))[1] for axis in ("tensor", "sequence")}
    return RankCosts(
        rank=rank,
        stage=stage,
        parameters=sum(sizes),
        kept=costs.kept(sizes, averaged, steps),
        activations=min(pipe - stage, steps) * held,  # 1F1B: so many forwards come before the first backward
        working=watch.peak - held,
        saved=kept_by_autograd,
        sent=sent | {"data": costs.sent(sizes, averaged, steps), "pipe": steps * passed.crossing},
        collectives=watch.collectives,
    )


class _Forward(NamedTuple):
    """A forward pass: its backward, the bytes that both send over the pipe axis, and what stays beside autograd's tensors."""

    backward: Callable[[], None]
    crossing: int
    kept: tuple[Any, ...]


class _WholeModel:
    """A model that is not in a pipeline."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        self.job, self.mesh = job, mesh
        with torch.device("meta"):
            self.model = VideoDiT(job.model, tensor=_tensor_parallel(job, mesh), recompute=job.recompute)

    def parameters(self) -> list[nn.Parameter]:
        """In the order in which they are used."""
        return [parameter for part in self.model.parts() for parameter in part.parameters()]

    def forward(self, micro: int) -> _Forward:
        group = self.mesh.group("sequence")
        inputs, labels = _micro_batch(self.job, self.mesh, micro)
        velocity = self.model(*inputs, group=group, backend=self.job.config.sequence_parallel.backend)
        loss = _loss(self.job, self.mesh, velocity, labels)
        return _Forward(loss.backward, 0, (inputs, labels))


class _PipelineStage:
    """A stage of a pipeline, with what DeepSpeed's engine keeps of a micro-batch."""

    def __init__(self, job: Job, mesh: Mesh) -> None:
        from megatron_dsp.pipeline import PipelinedVideoDiT  # imports DeepSpeed, which takes seconds

        class OnMeta(PipelinedVideoDiT):
            def to(self, *args: Any, **keywords: Any) -> OnMeta:
                return self  # DeepSpeed would move it to a device, which takes data

        self.job, self.mesh = job, mesh
        with _deepspeed_world(), torch.device("meta"):
            self.model = OnMeta(
                job.model,
                mesh,
                lambda patches, labels: _loss(job, mesh, unpatchify(patches, job.model.patch, labels[0].shape), labels),
                partition=job.partition,
                tensor=_tensor_parallel(job, mesh),
                backend=job.config.sequence_parallel.backend,
                recompute=job.recompute,
            )

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def forward(self, micro: int) -> _Forward:
        batch, labels = _micro_batch(self.job, self.mesh, micro)
        first, last = self.mesh.rank("pipe") == 0, self.mesh.rank("pipe") == self.mesh.size("pipe") - 1
        received = batch if first else self._received(micro)
        outputs = self.model(tuple(x.clone() for x in received))  # DeepSpeed's copies
        crossing = 0 if first else sum(x.nbytes for x in received if x.is_floating_point())
        if last:
            return _Forward(self.model.loss_fn(outputs, labels).backward, crossing, (received, labels, outputs))

        def backward() -> None:
            floats = [x for x in outputs if x.is_floating_point()]
            gradients = [torch.empty_like(x) for x in floats]
            for x, gradient in zip(floats, gradients, strict=True):
                x.backward(gradient, retain_graph=x is not floats[-1])

        return _Forward(backward, crossing + sum(x.nbytes for x in outputs), (received, outputs))

    def _received(self, micro: int) -> tuple[Tensor, ...]:
        """What comes from the stage before: the result of `PipelinedVideoDiT.forward` there."""
        job, model, group = self.job, self.model, self.mesh.group("sequence")
        frames, hidden, length = -(-job.frames // job.model.patch[0]), job.model.hidden, job.conditioning_tokens
        h, w = grid_size(job.height, job.width, job.model.patch)
        space = h * w if model.tensor.sequence_dim is None else model.tensor.own(h * w, "spatial tokens")
        layout = Layout(DIMS, (frames, micro, space, hidden), sharded=model._runner.layouts(frames, micro, space)[model._first])
        x = layout.local_sizes(group.size(), group.rank())
        floats = ((frames, micro, hidden), (frames, micro, 6 * hidden), (micro, length, hidden), x)
        dtype = self.parameters()[0].dtype
        return (
            *(torch.empty(shape, dtype=dtype, requires_grad=True) for shape in floats),
            *(torch.empty(shape, dtype=torch.uint8) for shape in ((micro, length), (h * w,))),
        )


@contextlib.contextmanager
def _deepspeed_world() -> Iterator[None]:
    """DeepSpeed's communication on the world as it is, in silence; DeepSpeed forgets it afterwards."""
    from deepspeed.comm import comm

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    os.environ.setdefault("LOCAL_RANK", "0")
    comm.cdb = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        comm.cdb = None


def _tensor_parallel(job: Job, mesh: Mesh) -> TensorParallel:
    return TensorParallel(mesh.group("tensor"), sequence_dim=2 if job.sequence_parallel else None)


def _make_fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on meta fake parameters, whose gradients vanish as soon as they are there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
            fake.register_post_accumulate_grad_hook(_forget_gradient)
            setattr(module, name, fake)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _micro_batch(job: Job, mesh: Mesh, micro: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """This rank's inputs of the model and labels of the loss, as pretrain_video.py makes them."""
    group, depth = mesh.group("sequence"), job.model.patch[0]
    token_frames = -(-job.frames // depth)
    start, stop = shard_range(token_frames, group.size(), group.rank())
    frames = range(start * depth, min(stop * depth, job.frames))
    video, noise = (torch.empty(len(frames), micro, job.model.channels, job.height, job.width) for _ in range(2))
    timesteps = torch.empty(token_frames, micro)
    times, every = (rectified_flow.frame_times(timesteps, depth, part) for part in (frames, range(job.frames)))
    conditioning = torch.empty(micro, job.conditioning_tokens, job.model.conditioning_size)
    mask, drop = torch.empty(micro, job.conditioning_tokens, dtype=torch.bool), torch.empty(micro, dtype=torch.bool)
    inputs = (rectified_flow.add_noise(video, noise, times), timesteps, conditioning, mask, drop)
    return inputs, (noise - video, rectified_flow.frame_weights(times, every))


def _loss(job: Job, mesh: Mesh, velocity: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
    target, weights = labels
    return rectified_flow.velocity_loss(velocity, target, weights, mesh.group("sequence"))


_ASSUMPTIONS = (
    "each row is the rank with the largest shards of a stage of the pipeline",
    "no tensor group crosses hosts, so that its ranks share the work of switches",
    "attention and norms keep what they keep on CPU; kernels of GPUs may keep something else",
    "activations: of all micro-batches under way at once; working: the most that backward has beside those and its gradients",
    "not counted: the allocator's fragments, buffers of NCCL and of switches, copies that DeepSpeed makes within a step",
    "overlap in chunks sends the same bytes",
)


def show(job: Job, ranks: list[RankCosts], console: Console) -> None:
    """Print tables of memory and of bytes, a row for each of ``ranks``, and what they rest on."""
    train, micro, steps = job.batch_sizes
    degrees = " x ".join(f"{axis} {job.grid.degrees[axis]}" for axis in reversed(AXES))
    costs = DeepSpeedCosts.of(job.config, ema=job.ema)
    console.print(
        f"dry run on {job.world_size} ranks = {degrees}; ZeRO {costs.stage}, {str(costs.dtype).removeprefix('torch.')}; "
        f"global batch size {train} = micro batch {micro} x accumulation {steps} x data {job.grid.degrees['data']}; "
        f"{job.frames} frames of {job.height} x {job.width}",
        highlight=False,
        soft_wrap=True,
    )
    most = max(rank.total for rank in ranks)
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    memory = Table("rank", "pipe", "parameters", "gradients", "optimizer", "buckets", "activations", "working", "total")
    memory.title = f"memory of a rank, {name}"
    sent = Table("rank", "pipe", *reversed(AXES), "total", title=f"sent by a rank in a step, {name}")
    for row in ranks:
        where = (str(row.rank), str(row.stage))
        memory.add_row(*where, *(f"{size / unit:.2f}" for size in (*row.kept, row.activations, row.working, row.total)))
        sizes = [row.sent[axis] for axis in reversed(AXES)]
        sent.add_row(*where, *(f"{size / unit:.2f}" for size in (*sizes, sum(sizes))))
    for table in (memory, sent):
        for column in table.columns:
            column.justify = "right"
        console.print(table)
    console.print(f"most memory of a rank: {most / unit:.2f} {name}", highlight=False)
    for line in _ASSUMPTIONS:
        console.print(f"- {line}", highlight=False, soft_wrap=True)
