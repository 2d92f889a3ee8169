"""Cells of the parallelism matrix: training at some degrees against one process, over the same samples.

Every cell takes the same global batches, so a reference depends on the optimizer and on clipping alone.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import overlap_of
from megatron_dsp.tensor import TensorParallel, own_shard, whole_shape

CONFIG = VideoDiTConfig(layers=2, hidden=24, heads=2, conditioning_size=6, patch=(1, 2, 2))
T, H, W = 5, 6, 4  # 5 token frames and 6 spatial tokens: uneven over 2 and 3 ranks
MICRO, BATCH, STEPS = 2, 8, 5
LR = {"SGD": 0.05, "AdamW": 1e-3}
CLIP = 0.1  # below the gradients' norm
LIMIT = 2e-6  # of losses, norms and weights, relative, in fp32
MOST_RANKS = 8


class Cell(NamedTuple):
    """Degrees, the ZeRO stage, and what else is on. ``sharded``: --sequence-parallel; ``precision``: fp32, bf16 or fp16."""

    tensor: int = 1
    pipe: int = 1
    sequence: int = 1
    data: int = 1
    zero: int = 0
    checkpointing: bool = False
    overlap: bool = False
    sharded: bool = False
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        return math.prod(self[:4])

    @property
    def clip(self) -> float:
        """DeepSpeed's own clipping is wrong with a pipeline in stage 0, and refused."""
        return 0.0 if self.pipe > 1 and self.zero == 0 else CLIP

    def __str__(self) -> str:
        switches = [name for name in ("checkpointing", "overlap", "sharded") if getattr(self, name)] + [self.precision]
        degrees = "-".join(f"{axis}{getattr(self, axis)}" for axis in ("tensor", "pipe", "sequence", "data", "zero"))
        return "-".join([degrees, *switches])


def all_degrees() -> list[Cell]:
    """Every combination of degrees and ZeRO stages that fits, with checkpointing and overlap off."""
    cells = itertools.starmap(Cell, itertools.product((1, 2), (1, 2), (1, 2, 3), (1, 2), (0, 1, 2, 3)))
    return [cell for cell in cells if cell.ranks <= MOST_RANKS]


def switch_cover() -> list[Cell]:
    """Cells with checkpointing or overlap on that together have each pair of values, chosen greedily."""
    cells = [
        cell._replace(checkpointing=checkpointing, overlap=overlap)
        for cell in all_degrees()
        for checkpointing, overlap in ((True, False), (False, True), (True, True))
        if cell.pipe == 1 or cell.zero < 2
    ]

    def pairs(cell: Cell) -> set[tuple[Any, ...]]:
        return set(itertools.combinations(enumerate(cell[:7]), 2))

    left = set().union(*map(pairs, cells))
    cover = []
    while left:
        cell = max(cells, key=lambda cell: len(pairs(cell) & left))
        cover.append(cell)
        left -= pairs(cell)
    return cover


def run(cell: Cell, references: dict[tuple[str, float], Any]) -> float:
    """Train a cell with both optimizers; the largest relative difference from one process. Errors: what training raises."""
    return max(run_with(optimizer, cell, references) for optimizer in LR)


def run_with(optimizer: str, cell: Cell, references: dict[tuple[str, float], Any]) -> float:
    """The same with one optimizer."""
    return _run(cell, optimizer, references[optimizer, cell.clip])


def references() -> dict[tuple[str, float], Any]:
    """(losses, norms, weights) of one process, by optimizer and clipping."""
    return {(optimizer, clip): _reference(optimizer, clip) for optimizer in LR for clip in (0.0, CLIP)}


def _batch(step: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and labels of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    draw = functools.partial(torch.randn, generator=generator)
    mask = torch.arange(3) < torch.randint(1, 4, (BATCH, 1), generator=generator)
    drop = torch.rand(BATCH, generator=generator) < 0.2
    inputs = draw(T, BATCH, 3, H, W), torch.rand(T, BATCH, generator=generator), draw(BATCH, 3, 6), mask, drop
    weight = torch.linspace(0.5, 2, T * H * W).view(T, 1, 1, H, W).expand(T, BATCH, 3, H, W)  # depends on the position
    return inputs, (draw(T, BATCH, 3, H, W), weight)


def _part(values: tuple[Tensor, ...], samples: slice, frames: slice) -> tuple[Tensor, ...]:
    """Of samples, these; of videos, these frames."""
    return tuple(
        value[frames, samples] if value.dim() == 5 else value[:, samples] if len(value) == T else value[samples]
        for value in values
    )


def _loss(velocity: Tensor, labels: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> Tensor:
    target, weight = labels
    error = (velocity.float() - target).square() * weight
    return error.mean() if group is None else dsp.mean_loss(error, group=group)


def _noisy(parameter: Tensor, seed: int) -> None:
    """Add noise to a parameter, or to this rank's shard of it."""
    noise = 0.1 * torch.randn(whole_shape(parameter), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        parameter += own_shard(noise, like=parameter)


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by part and name, as "3.mlp.0.weight": the same names with a pipeline and without."""
    parts = model.parts() if isinstance(model, VideoDiT) else model.forward_funcs
    first = getattr(model, "_local_start", 0)
    return {f"{index}.{name}": p for index, part in enumerate(parts, first) for name, p in part.named_parameters()}


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(model.parameters(), lr=LR[name])


def _prepare(model: nn.Module) -> None:
    for name, parameter in _named(model).items():
        _noisy(parameter, sum(map(ord, name)))


def _reference(name: str, clip: float) -> tuple[list[float], list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    _prepare(model)
    optimizer = _optimizer(name, model)
    losses, norms = [], []
    for step in range(STEPS):
        inputs, labels = _batch(step)
        loss = _loss(model(*inputs), labels, None)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach() for name, parameter in _named(model).items()}


def ds_config(cell: Cell, optimizer: str) -> dict[str, Any]:
    """SGD comes from the client, AdamW from the config."""
    params = {"lr": LR[optimizer], "weight_decay": 0.01, "torch_adam": True}
    return {
        **({"optimizer": {"type": optimizer, "params": params}} if optimizer == "AdamW" else {}),
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO,
        "gradient_clipping": cell.clip,
        "zero_optimization": {"stage": cell.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "mesh": {"tensor": cell.tensor, "pipe": cell.pipe},
        "sequence_parallel": {"size": cell.sequence, "overlap": {"chunks": 2 if cell.overlap else 1}},
        **({} if cell.precision == "fp32" else {cell.precision: {"enabled": True}}),
    }


def make(cell: Cell, name: str, settings: Mapping[str, Any] | None = None, **more: Any) -> tuple[Any, dsp.Mesh]:
    """An engine with an optimizer of this name. ``settings``: more of the ds_config. ``more``: arguments of
    ``dsp.deepspeed_initialize``, functions of the model.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    config = {**ds_config(cell, name), **(settings or {})}
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    torch.manual_seed(0)
    tensor = TensorParallel(mesh.group("tensor"), sequence_dim=2 if cell.sharded else None)
    if cell.pipe > 1:
        from megatron_dsp.pipeline import PipelinedVideoDiT

        def loss_of(patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
            return _loss(unpatchify(patches, CONFIG.patch, labels[0].shape), labels, group)

        model = PipelinedVideoDiT(CONFIG, mesh, loss_of, tensor=tensor, recompute=cell.checkpointing)
    else:
        model = VideoDiT(CONFIG, tensor=tensor, recompute=cell.checkpointing)
    _prepare(model)
    given = {name: made(model) for name, made in more.items()}
    if "optimizer" in given:
        config.pop("optimizer", None)
    elif "optimizer" not in config:
        given["optimizer"] = _optimizer(name, model)
    engine, *_ = dsp.deepspeed_initialize(model=model, config=config, mesh=mesh, **given)
    return engine, mesh


def train(engine: Any, mesh: dsp.Mesh, steps: Iterable[int]) -> tuple[list[float], list[float | None]]:
    """Losses and norms of gradients in these steps; in stage 0 there are no norms."""
    group, data = mesh.group("sequence"), mesh.size("data")
    frames = slice(*dsp.shard_range(T, group.size(), group.rank()))
    losses, norms = [], []
    for step in steps:
        batch = _batch(step)
        starts = range(mesh.rank("data") * MICRO, BATCH, MICRO * data)
        parts = [tuple(_part(values, slice(start, start + MICRO), frames) for values in batch) for start in starts]
        if mesh.size("pipe") > 1:
            value = engine.train_batch(iter(parts))
        else:
            value = torch.zeros(())
            for inputs, labels in parts:
                loss = _loss(engine(*inputs, group=group), labels, group)
                engine.backward(loss)
                engine.step()
                value += loss.detach() / len(parts)
            dist.all_reduce(value, group=mesh.group("data", "sequence"))
            value /= mesh.size("data") * mesh.size("sequence")
        losses.append(value.item())
        norm = engine.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return losses, norms


def _run(cell: Cell, name: str, reference: tuple[list[float], list[float], dict[str, Tensor]]) -> float:
    import deepspeed

    engine, mesh = make(cell, name)
    model, group = engine.module, mesh.group("sequence")
    losses, norms = train(engine, mesh, range(STEPS))

    expected_losses, expected_norms, expected = reference
    errors = [abs(loss / right - 1) for loss, right in zip(losses, expected_losses, strict=True)]
    if cell.precision == "fp32":
        errors += [abs(norm / right - 1) for norm, right in zip(norms, expected_norms, strict=True) if norm is not None]
    if name == "SGD" and cell.precision == "fp32":  # AdamW makes of rounding in gradients that are zero what it likes
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            for key, parameter in _named(model).items():
                whole = expected[key]
                errors.append(((parameter.detach() - own_shard(whole, like=parameter)).abs().max() / whole.abs().max()).item())
    assert (engine.train_batch_size(), engine.global_samples, engine.tput_timer.batch_size) == (BATCH, STEPS * BATCH, BATCH)
    if cell.overlap and cell.sequence > 1 and cell.pipe == 1:  # a stage of a pipeline may have no switch of its own
        assert any("chunks" in decision for decision in overlap_of(group).decisions)
    if cell.zero:
        assert None not in norms
    engine.destroy()
    del engine, model
    gc.collect()
    return max(errors)
