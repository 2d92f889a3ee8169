"""The average of the weights against one process, where DeepSpeed keeps them, and in files."""

from __future__ import annotations

import functools
import gc
import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallelism
import pytest
import torch
import torch.distributed as dist
from parallelism import BATCH, CONFIG, LR, MICRO, Cell, T
from safetensors.torch import load_file
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.checkpoint.tensor_file import TensorFile
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.video_dit import VideoDiT
from megatron_dsp.tensor import TensorParallel, own_shard
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.master_weights import MasterWeights, reason_against

DECAY, STEPS = 0.7, 6
Reference = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


@functools.cache
def _reference(clip: float) -> Reference:
    """By part and name the average of one process's weights, and the weights; and what the model of the average computes."""
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    parallelism._prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR["SGD"])
    average = {name: p.detach().clone() for name, p in parallelism._named(model).items()}
    for step in range(STEPS):
        inputs, labels = parallelism._batch(step)
        optimizer.zero_grad()
        parallelism._loss(model(*inputs), labels, None).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for name, parameter in parallelism._named(model).items():
            average[name] = DECAY * average[name] + (1 - DECAY) * parameter.detach()
    weights = {name: p.detach().clone() for name, p in parallelism._named(model).items()}
    with torch.no_grad():
        for name, parameter in parallelism._named(model).items():
            parameter.copy_(average[name])
        output = model(*parallelism._batch(99)[0])
    return average, weights, output


def _engine(cell: Cell) -> tuple[Any, dsp.Mesh]:
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    config = parallelism.ds_config(cell, "SGD")
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    tensor = TensorParallel(mesh.group("tensor"))
    if cell.pipe > 1:
        from megatron_dsp.pipeline import PipelinedVideoDiT

        def loss_of(patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
            return parallelism._loss(unpatchify(patches, CONFIG.patch, labels[0].shape), labels, group)

        model: nn.Module = PipelinedVideoDiT(CONFIG, mesh, loss_of, tensor=tensor)
    else:
        model = VideoDiT(CONFIG, tensor=tensor)
    parallelism._prepare(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR["SGD"])
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    return engine, mesh


def _train(engine: Any, mesh: dsp.Mesh, ema: EMA) -> None:
    group, data = mesh.group("sequence"), mesh.size("data")
    frames = slice(*dsp.shard_range(T, group.size(), group.rank()))
    for step in range(STEPS):
        batch = parallelism._batch(step)
        starts = range(mesh.rank("data") * MICRO, BATCH, MICRO * data)
        parts = [tuple(parallelism._part(v, slice(start, start + MICRO), frames) for v in batch) for start in starts]
        if mesh.size("pipe") > 1:
            engine.train_batch(iter(parts))
            assert engine.was_step_applied()
            ema.update()
            continue
        for inputs, labels in parts:
            engine.backward(parallelism._loss(engine(*inputs, group=group), labels, group))
            engine.step()
            if engine.was_step_applied():
                ema.update()


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module) -> None:
    """Tensors by the model's names with those by part and name."""
    keys = {id(parameter): key for key, parameter in parallelism._named(model).items()}
    parameters = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    for name, parameter in parameters.items():
        whole = expected[keys[id(parameter)]]
        error = (found[name] - own_shard(whole, like=parameter)).abs().max() / whole.abs().max()
        assert error < 1e-6, f"{name}: {error}"


def _outputs(engine: Any, mesh: dsp.Mesh) -> Tensor:
    group = mesh.group("sequence")
    frames = slice(*dsp.shard_range(T, group.size(), group.rank()))
    inputs = [parallelism._part(value, slice(None), frames) for value in parallelism._batch(99)]
    engine.eval()
    with torch.no_grad():
        return engine(*inputs[0], group=group)


def _end(engine: Any) -> None:
    engine.destroy()
    gc.collect()


def _averages(cell: Cell, reference: Reference, folder: Path) -> None:
    average, weights, output = reference
    engine, mesh = _engine(cell)
    ema = EMA(engine, mesh, DECAY)
    _train(engine, mesh, ema)

    place = f"tp_{mesh.rank('tensor'):02d}_pp_{mesh.rank('pipe'):02d}.safetensors"
    checkpointing.save(engine, folder, Progress(STEPS, STEPS * BATCH), mesh, ema)
    _compare(load_file(folder / f"global_step{STEPS}" / f"ema_model_{place}"), average, engine.module)
    _compare(load_file(folder / f"global_step{STEPS}" / f"weights_{place}"), weights, engine.module)

    sizes = [sum(tensor.numel() for tensor in tensors) for tensors in (ema._average, MasterWeights(engine, mesh).tensors())]
    assert sizes[0] == sizes[1]
    if cell.zero:
        whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
        assert sizes[0] < 1.1 * whole / (cell.sequence * cell.data)

    if cell.pipe == 1:
        frames = slice(*dsp.shard_range(T, cell.sequence, mesh.rank("sequence")))
        before = _outputs(engine, mesh), [tensor.clone() for tensor in MasterWeights(engine, mesh).tensors()]
        with ema.applied():
            torch.testing.assert_close(_outputs(engine, mesh), output[frames], rtol=2e-6, atol=2e-6)
            for call in (ema.update, lambda: checkpointing.save(engine, folder, Progress(), mesh, ema)):
                with pytest.raises(dsp.UsageError, match="inside EMA"):
                    call()
        after = _outputs(engine, mesh), MasterWeights(engine, mesh).tensors()
        assert not torch.allclose(before[0], output[frames], atol=1e-3), "the average would be the weights"
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(*pair) for pair in zip(before[1], after[1], strict=True))

    plain = VideoDiT(CONFIG, tensor=TensorParallel(mesh.group("tensor")))
    for kind, expected in ((True, average), (False, weights)):
        assert checkpointing.load_weights(plain, folder, mesh, ema=kind) == Progress(STEPS, STEPS * BATCH)
        _compare(dict(plain.named_parameters()), expected, plain)

    other = EMA(engine, mesh, DECAY)
    assert not all(torch.equal(*pair) for pair in zip(ema._average, other._average, strict=True))
    progress = checkpointing.load(engine, folder, mesh, other)
    assert progress == Progress(STEPS, STEPS * BATCH)
    assert all(torch.equal(*pair) for pair in zip(ema._average, other._average, strict=True))
    _end(engine)


def _passes_through(cell: Cell, file: Path, copy: Path) -> None:
    engine, mesh = _engine(cell)
    ema = EMA(engine, mesh, DECAY)
    ema.load(TensorFile(file))
    ema.save(copy, {})
    _end(engine)


@pytest.mark.parametrize("zero", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 1, 2)), 3])
def test_the_average_is_that_of_one_process(ranks, tmp_path, zero):
    cell = Cell(sequence=2, data=2, zero=zero)
    ranks(4, _averages, cell, _reference(cell.clip), tmp_path)
    file, copy = tmp_path / f"global_step{STEPS}" / "ema_model_tp_00_pp_00.safetensors", tmp_path / "copy.safetensors"
    other = Cell(sequence=3, zero=4 - zero if zero else 3)  # another stage, and other degrees
    ranks(3, _passes_through, other, file, copy)
    one, two = load_file(file), load_file(copy)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].view(torch.int32), two[name].view(torch.int32)) for name in one)


@pytest.mark.parametrize(
    "cell",
    [Cell(pipe=2, data=2, zero=1), pytest.param(Cell(pipe=2, data=2), marks=pytest.mark.long), Cell(tensor=2, data=2, zero=1)],
)
def test_the_average_with_pipe_and_tensor_axes(ranks, tmp_path, cell):
    ranks(cell.ranks, _averages, cell, _reference(cell.clip), tmp_path)


class _Small(nn.Module):
    """Uneven sizes, a frozen layer, buffers of two dtypes, and one that is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen, self.last = nn.Linear(7, 5), nn.Linear(5, 11), nn.Linear(11, 3)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("mean", torch.zeros(11))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("ramp", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.frozen(self.first(x).tanh())
        self.mean += hidden.detach().mean(0)
        self.calls += 1
        return self.scale * self.last(hidden) + self.ramp


def _gathered(engine: Any) -> dict[str, Tensor]:
    """The fp32 weights of trained parameters by DeepSpeed's own means; in stage 0 it has none but its copies.

    With round-robin gradients its means are wrong, but weights that are trained in fp32 are the model's.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    if engine.zero_round_robin_gradients():
        return {name: p.detach().clone() for name, p in named.items()}
    if engine.zero_optimization_stage() == 0:
        copies = itertools.chain.from_iterable(getattr(engine.optimizer, "fp32_groups", [list(named.values())]))
        return dict(zip(named, (copy.detach().clone() for copy in copies), strict=True))
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named.items()}


def _whole(engine: Any) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def _follows_master_weights(config: dict[str, Any], folder: Path) -> str:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    model = _Small()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": dist.get_world_size()},
        **config,
    }
    mesh = dsp.initialize(config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    ema = EMA(engine, mesh, DECAY)
    expected = _gathered(engine)
    dtype = next(engine.module.parameters()).dtype
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        engine.backward(engine(torch.randn(4, 7, generator=generator).to(dtype)).float().square().mean())
        engine.step()
        ema.update()
        expected = {name: torch.lerp(expected[name], value, 1 - DECAY) for name, value in _gathered(engine).items()}

    before = _whole(engine)
    with ema.applied():
        for name, value in _whole(engine).items():
            right = expected[name].to(dtype) if name in expected else before[name]
            assert torch.equal(value, right), name
    assert all(torch.equal(value, before[name]) for name, value in _whole(engine).items())

    checkpointing.save(engine, folder, Progress(3, 6), mesh, ema)
    path = folder / "global_step3"
    frozen = {name: value.float() for name, value in before.items() if name not in expected}
    buffers = {"mean": engine.module.mean, "calls": engine.module.calls}
    for file, trained in (("ema_model", expected), ("weights", _gathered(engine))):
        found = load_file(path / f"{file}_tp_00_pp_00.safetensors")
        right = {**trained, **frozen, **buffers}
        assert found.keys() == right.keys()
        for name, value in right.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    plain = _Small()
    assert checkpointing.load_weights(plain, folder, mesh, ema=True) == Progress(3, 6)
    values = plain.state_dict()
    assert all(torch.equal(values[name], value) for name, value in {**expected, **frozen, **buffers}.items())
    optimizer_of = type(engine.optimizer).__name__
    _end(engine)
    return optimizer_of


_BF16, _FP32_SUMS, _ON_CPU = {"bf16": {"enabled": True}}, {"data_types": {"grad_accum_dtype": "fp32"}}, {"device": "cpu"}
_ROUND_ROBIN = {"zero_optimization": {"stage": 1, "round_robin_gradients": True}}


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        ({}, "SGD"),
        (_BF16, "FP16_UnfusedOptimizer"),
        ({"zero_optimization": {"stage": 1}, **_BF16, **_FP32_SUMS}, "BF16_Optimizer"),
        ({"zero_optimization": {"stage": 1}, **_BF16}, "DeepSpeedZeroOptimizer"),
        (_ROUND_ROBIN, "DeepSpeedZeroOptimizer"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": _ON_CPU}, **_BF16}, "DeepSpeedZeroOptimizer"),
        ({"zero_optimization": {"stage": 3}, **_BF16}, "DeepSpeedZeroOptimizer_Stage3"),
        (
            {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20}},
            "DeepSpeedZeroOptimizer_Stage3",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": _ON_CPU, "offload_param": _ON_CPU}, **_BF16},
            "DeepSpeedZeroOptimizer_Stage3",
        ),
    ],
)
def test_the_average_follows_the_master_weights_of_each_optimizer(ranks, tmp_path, config, optimizer):
    assert ranks(3, _follows_master_weights, config, tmp_path) == [optimizer] * 3


def _refusals(folder: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = {"train_micro_batch_size_per_gpu": 2, "mesh": {"tensor": 2}}
    mesh = dsp.initialize(config)
    engine, *_ = dsp.deepspeed_initialize(
        model=_Small(), optimizer=functools.partial(torch.optim.SGD, lr=0.1), config=config, mesh=mesh
    )
    for decay in (-0.1, 1.0):
        with pytest.raises(dsp.UsageError, match=f"EMA decay {decay}: must be"):
            EMA(engine, mesh, decay)
    checkpointing.save(engine, folder, Progress(1, 2), mesh)
    ema = EMA(engine, mesh, DECAY)
    with pytest.raises(
        dsp.UsageError, match=r"'global_step1' has no EMA; resume without one, or load\(\.\.\., ema=None\) first"
    ):
        checkpointing.load(engine, folder, mesh, ema)
    with pytest.raises(dsp.UsageError, match="'global_step1' has no EMA; give ema=False"):
        checkpointing.load_weights(_Small(), folder, mesh, ema=True)

    checkpointing.save(engine, folder, Progress(2, 4), mesh, ema)
    assert checkpointing.load(engine, folder, mesh) == Progress(2, 4)  # its average is left alone
    other = _Small()
    other.last, other.more = nn.Linear(11, 4), nn.Linear(1, 1)
    with pytest.raises(dsp.UsageError) as error:
        checkpointing.load_weights(other, folder, mesh, ema=True)
    for part in ("2 missing: more.bias, more.weight", "last.weight [3, 11] instead of [4, 11]", "last.bias [3] instead of [4]"):
        assert part in str(error.value)
    assert checkpointing.load_weights(_Small(), folder, dsp.Mesh(), ema=True) == Progress(2, 4)

    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "global_step2" / "ema_model_tp_01_pp_00.safetensors").unlink()
    dist.barrier()
    with pytest.raises(dsp.UsageError, match="'global_step1' has no EMA"):  # the one before, on both ranks
        checkpointing.load(engine, folder, mesh, ema)
    _end(engine)


def test_what_does_not_fit_is_refused(ranks, tmp_path):
    ranks(2, _refusals, tmp_path)


def _parameters_in_bf16() -> None:
    mesh = dsp.Mesh()
    engine, *_ = dsp.deepspeed_initialize(
        model=_Small().bfloat16(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        config={"train_micro_batch_size_per_gpu": 2},
        mesh=mesh,
    )
    with pytest.raises(
        dsp.UsageError, match=r"needs fp32 weights in contiguous memory, but the optimizer's are torch\.bfloat16"
    ):
        EMA(engine, mesh, DECAY)
    _end(engine)


def test_weights_that_are_nowhere_in_fp32_are_refused(ranks):
    ranks(1, _parameters_in_bf16)


@pytest.mark.parametrize("key", ["offload_optimizer", "offload_param"])
def test_nvme_is_refused(key):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=3, **{key: {"device": "nvme", "nvme_path": "/tmp"}})
    engine = SimpleNamespace(optimizer=object(), _config=SimpleNamespace(zero_config=zero))  # a real one needs libaio
    assert f"zero_optimization.{key}.device=nvme" in reason_against(engine)
