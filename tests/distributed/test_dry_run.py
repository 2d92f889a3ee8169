"""Dry runs of the tiny model against real runs of it: bytes by axis, and memory that is measured in other ways."""

from __future__ import annotations

import gc
import itertools
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import megatron_dsp as dsp
from megatron_dsp import config as configs
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.video_dit import PRESETS, VideoDiT
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training import rectified_flow
from megatron_dsp.training.dry_run import Job, RankCosts, rank_costs
from megatron_dsp.training.fake_world import SavedTensors

LIMIT = 0.05
MODEL = replace(PRESETS["tiny"], channels=3)
FRAMES, HEIGHT, WIDTH, TOKENS = 5, 32, 48, 4  # 5 frames: uneven over 2 ranks
MICRO, ACCUMULATION = 2, 2


@dataclass(frozen=True)
class Cell:
    tensor: int = 1
    pipe: int = 1
    sequence: int = 1
    data: int = 1
    zero: int = 0
    precision: str = "fp32"
    backend: str = "dsp"
    sharded: bool = False
    recompute: bool = False
    persistent: int = 100_000  # ZeRO 3: elements of parameters that stay whole
    ahead: int = 50_000_000  # ZeRO 3: elements of parameters that are gathered ahead

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipe * self.sequence * self.data

    @property
    def config(self) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": ACCUMULATION,
            "zero_optimization": {
                "stage": self.zero,
                "reduce_bucket_size": 200_000,
                "stage3_param_persistence_threshold": self.persistent,
                "stage3_prefetch_bucket_size": self.ahead,
                "stage3_max_reuse_distance": 0,
            },
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "mesh": {"tensor": self.tensor, "pipe": self.pipe},
            "sequence_parallel": {"size": self.sequence, "backend": self.backend, "overlap": {"enabled": False}},
        }

    @property
    def job(self) -> Job:
        return Job(
            MODEL,
            self.ranks,
            configs.load(self.config),
            FRAMES,
            HEIGHT,
            WIDTH,
            TOKENS,
            sequence_parallel=self.sharded,
            recompute=self.recompute,
        )

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in asdict(self).items() if value != getattr(Cell, name))


class Measured(NamedTuple):
    """Of one rank, in bytes; those of its second step, when the optimizer has its state."""

    parameters: int  # the storages of the module's parameters, the most of them
    others: int  # the most of other tensors that Python sees between backward and the end of the step
    saved: int  # the most that autograd keeps at a time
    peak: int  # of forward and backward of a micro-batch outside DeepSpeed, by the profiler; 0 in a pipeline
    sent: dict[str, int]  # by axis


def _storages(tensors: Iterable[Any]) -> dict[int, int]:
    storages = (x.untyped_storage() for x in tensors if issubclass(type(x), Tensor) and x.device.type == "cpu")
    return {storage._cdata: storage.nbytes() for storage in storages}


def _parameters(model: nn.Module) -> dict[int, int]:
    return _storages(x for p in model.parameters() for x in (p.data, getattr(p, "ds_tensor", p.data)))


def _others(engine: Any) -> int:
    """Bytes of tensors that are neither parameters nor activations; those that were there before gc.freeze are not seen."""
    if hasattr(engine, "pipe_buffers"):
        # All micro-batches are done, but the last outputs and loss, and their graphs, stay until the next step.
        engine.loss = None
        for buffers in engine.pipe_buffers.values():
            buffers[:] = [None] * len(buffers)
    time.sleep(0.2)  # Gloo's threads let go of the last collective's tensors after it has returned
    gc.collect()
    seen = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
    there = _storages([*seen, *(x.grad for x in seen if x.is_leaf)])
    received = _storages(
        tree_leaves([getattr(engine, name, None) for name in ("pipe_recv_buf", "grad_layer", "_grad_layer_buf")])
    )
    return sum(size for storage, size in there.items() if storage not in _parameters(engine.module) | received)


def _micro_batch(mesh: dsp.Mesh) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    start, stop = dsp.shard_range(FRAMES, mesh.size("sequence"), mesh.rank("sequence"))
    video, noise = (torch.randn(stop - start, MICRO, 3, HEIGHT, WIDTH) for _ in range(2))
    timesteps = torch.rand(FRAMES, MICRO)
    times, every = (rectified_flow.frame_times(timesteps, 1, frames) for frames in (range(start, stop), range(FRAMES)))
    mask, drop = torch.ones(MICRO, TOKENS, dtype=torch.bool), torch.zeros(MICRO, dtype=torch.bool)
    noisy = rectified_flow.add_noise(video, noise, times)
    conditioning = torch.randn(MICRO, TOKENS, MODEL.conditioning_size)
    return (noisy, timesteps, conditioning, mask, drop), (noise - video, rectified_flow.frame_weights(times, every))


def _peak(run: Callable[[], None]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def _count_deepspeed(patch: pytest.MonkeyPatch, sent: Counter[str]) -> None:
    """Count what DeepSpeed sends, by a ring where it reduces."""
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.pipe import p2p

    all_reduce, gather, scatter = (
        getattr(TorchBackend, name) for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    )
    send = p2p.send

    def counted_all_reduce(self: Any, tensor: Tensor, op: Any, group: Any = None, async_op: bool = False) -> Any:
        ranks = dist.get_world_size(group)
        if tensor.numel() > 2:  # others are norms, flags and losses
            sent["data"] += int(2 * (ranks - 1) / ranks * tensor.nbytes)
        return all_reduce(self, tensor, op, group, async_op)

    def counted_gather(self: Any, output_tensor: Tensor, input_tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent["data"] += output_tensor.nbytes - input_tensor.nbytes
        return gather(self, output_tensor, input_tensor, *arguments, **keywords)

    def counted_scatter(self: Any, output_tensor: Tensor, input_tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
        sent["data"] += input_tensor.nbytes - output_tensor.nbytes
        return scatter(self, output_tensor, input_tensor, *arguments, **keywords)

    def counted_send(tensor: Tensor, *arguments: Any) -> None:
        sent["pipe"] += tensor.nbytes
        send(tensor, *arguments)

    patch.setattr(TorchBackend, "all_reduce", counted_all_reduce)
    patch.setattr(TorchBackend, "all_gather_into_tensor", counted_gather)
    patch.setattr(TorchBackend, "reduce_scatter_tensor", counted_scatter)
    patch.setattr(p2p, "send", counted_send)


def _measure(cell: Cell) -> Measured:
    import deepspeed  # noqa: F401  before gc.freeze

    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    gc.collect()
    gc.freeze()
    try:
        return _measure_new(cell)
    finally:
        gc.unfreeze()


def _measure_new(cell: Cell) -> Measured:
    mesh = dsp.initialize(cell.config)
    group = mesh.group("sequence")
    tensor = TensorParallel(mesh.group("tensor"), sequence_dim=2 if cell.sharded else None)

    def loss_of(velocity: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        return rectified_flow.velocity_loss(velocity, *labels, group)

    peak = 0
    if cell.pipe > 1:
        from megatron_dsp.pipeline import PipelinedVideoDiT

        def pipeline_loss(patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
            return loss_of(unpatchify(patches, MODEL.patch, labels[0].shape), labels)

        model = PipelinedVideoDiT(MODEL, mesh, pipeline_loss, tensor=tensor, backend=cell.backend, recompute=cell.recompute)
    else:
        model = VideoDiT(MODEL, tensor=tensor, recompute=cell.recompute)
        peak = _measure_pass(model, mesh, cell, loss_of)
    engine, *_ = dsp.deepspeed_initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=cell.config, mesh=mesh
    )
    parameters, others, sent = [0], [0], Counter[str]()

    def step() -> None:
        if cell.pipe > 1:
            engine.train_batch(_micro_batch(mesh) for _ in range(ACCUMULATION))
            return
        for _ in range(ACCUMULATION):
            inputs, labels = _micro_batch(mesh)
            loss = loss_of(engine(*inputs, group=group, backend=cell.backend), labels)
            del inputs, labels
            parameters.append(sum(_parameters(model).values()))
            engine.backward(loss)
            engine.step()

    def noting(owner: Any, name: str, *, once: bool = False) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if once:
                patch.setattr(owner, name, function)
            others.append(_others(engine))
            return function(*arguments, **keywords)

        patch.setattr(owner, name, call)

    step()
    with pytest.MonkeyPatch.context() as patch:
        _count_deepspeed(patch, sent)
        noting(engine, "buffered_allreduce_fallback" if cell.pipe > 1 and cell.precision == "bf16" else "allreduce_gradients")
        if cell.zero in (1, 2) and cell.precision == "fp32":
            noting(engine.optimizer, "overlapping_partition_gradients_reduce_epilogue")
            if cell.pipe > 1:  # its first gradient is reduced when all of them and two buckets are there
                noting(engine.optimizer, "reduce_ready_partitions_and_remove_grads", once=True)
        with dsp.ledger() as moved, SavedTensors(model.parameters()) as saved:
            step()
    parameters.append(sum(_parameters(model).values()))
    sent |= {axis: size for axis, (_, size) in moved.by("group").items()}
    result = Measured(max(parameters), max(others), saved.peak, peak, dict(sent))
    engine.destroy()
    return result


def _measure_pass(model: nn.Module, mesh: dsp.Mesh, cell: Cell, loss_of: Callable[..., Tensor]) -> int:
    """The peak of a pass in fp32 whose gradients of weights vanish."""
    exchange_of(mesh.group("sequence")).transport.buffers._LEAST = 1 << 60  # all memory is torch's, which the profiler sees

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(forget) for parameter in model.parameters()]

    def run() -> None:
        inputs, labels = _micro_batch(mesh)
        loss_of(model(*inputs, group=mesh.group("sequence"), backend=cell.backend), labels).backward()

    peak = min(_peak(run) for _ in range(2))  # the first has some memory that stays
    for hook in hooks:
        hook.remove()
    return peak


def _errors(cell: Cell, expected: RankCosts, measured: Measured) -> dict[str, float]:
    """Relative errors of a dry run."""
    kept = expected.kept
    pairs = {
        "parameters": (kept.parameters, measured.parameters),
        "gradients, optimizer, buckets": (sum(kept) - kept.parameters, measured.others),
    }
    if cell.zero < 3 or cell.persistent:  # else weights come and go while autograd keeps them
        pairs["saved"] = (expected.saved * min(cell.pipe - expected.stage, ACCUMULATION), measured.saved)
    if measured.peak and cell.precision == "fp32":
        pairs["peak"] = (expected.activations + expected.working, measured.peak)
    for axis in ("tensor", "sequence", "data", "pipe"):
        pairs[f"sent over {axis}"] = (expected.sent[axis], measured.sent.get(axis, 0))
    return {name: abs(math.inf if b == 0 < a else a / b - 1) for name, (a, b) in pairs.items() if a or b}


CELLS = [
    Cell(tensor=2, sequence=2, zero=2),
    Cell(pipe=2, sequence=2, zero=1),
    Cell(sequence=2, data=2, zero=1, precision="bf16"),
]
LONG = [
    Cell(tensor=2, pipe=2, zero=0, sharded=True),
    Cell(tensor=2, pipe=2, sequence=2, zero=1, recompute=True),
    Cell(sequence=2, data=2, zero=3),
    Cell(tensor=2, sequence=2, data=2, zero=3, persistent=0, ahead=0),
    Cell(sequence=4, data=2, zero=2, precision="bf16", recompute=True),
    Cell(sequence=2, data=2, zero=3, precision="bf16"),
    Cell(pipe=2, sequence=2, zero=1, precision="bf16"),
    Cell(tensor=2, sequence=2, zero=0, backend="ulysses", recompute=True),
]


@pytest.mark.parametrize("cell", CELLS + [pytest.param(cell, marks=pytest.mark.long) for cell in LONG], ids=str)
def test_dry_run_is_near_what_is_measured(ranks, cell):
    measured = ranks(cell.ranks, _measure, cell)
    for rank in (0, cell.ranks - 1):
        errors = _errors(cell, rank_costs(cell.job, rank), measured[rank])
        print(cell, rank, {name: f"{error:.2%}" for name, error in errors.items()})
        assert max(errors.values()) <= LIMIT, (rank, errors)
