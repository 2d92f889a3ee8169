"""Meshes of real process groups, and what DeepSpeed, torch and the samplers see of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.mesh import AXES

GROUPS = [("pipe",), ("data",), ("sequence",), ("tensor",), ("data", "sequence"), ("pipe", "tensor")]
# world size, degrees given, {axis: degree}
MESHES = [
    (4, {"tensor": 2, "sequence": 2}, {"pipe": 1, "data": 1, "sequence": 2, "tensor": 2}),
    (3, {"sequence": 3}, {"pipe": 1, "data": 1, "sequence": 3, "tensor": 1}),
    (4, {"sequence": 2}, {"pipe": 1, "data": 2, "sequence": 2, "tensor": 1}),
    (4, {"pipe": 2, "data": 2}, {"pipe": 2, "data": 2, "sequence": 1, "tensor": 1}),
]
on_each_mesh = pytest.mark.parametrize(("size", "given", "degrees"), MESHES)


def _sum_of_ranks(group: dist.ProcessGroup) -> int:
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=group)
    return int(value)


def _groups(given: dict[str, int], degrees: dict[str, int]) -> None:
    mesh = dsp.Mesh(**given)
    rank = dist.get_rank()
    for axis, degree in degrees.items():
        assert mesh.size(axis) == degree
        assert mesh.rank(axis) == mesh.grid.coordinate(rank, axis)
    for axes in GROUPS:
        (members,) = [ranks for ranks in mesh.grid.groups(*axes) if rank in ranks]
        group = mesh.group(*axes)
        assert group is mesh.group(*reversed(axes))
        assert dist.get_process_group_ranks(group) == members
        assert _sum_of_ranks(group) == sum(members)
    for axes in [("time",), (), ("data", "data"), ("tensor", "sequence")]:
        with pytest.raises(dsp.UsageError, match=r"a mesh has no group over .*data, sequence"):
            mesh.group(*axes)
    with pytest.raises(dsp.UsageError, match="no group"):
        mesh.size("time")


@on_each_mesh
def test_groups_are_real_on_every_axis(ranks, size, given, degrees):
    ranks(size, _groups, given, degrees)


def _mpu(given: dict[str, int]) -> None:
    mesh = dsp.Mesh(**given)
    mpu = mesh.mpu
    # DeepSpeed asks with hasattr, and reduces otherwise or not at all where it finds a sequence axis.
    assert not [name for name in dir(mpu) if "sequence" in name]
    for name, axes in {
        "data_parallel": ("data", "sequence"),
        "model_parallel": ("pipe", "tensor"),
        "tensor_model_parallel": ("tensor",),
        "pipeline_model_parallel": ("pipe",),
    }.items():
        group = mesh.group(*axes)
        assert getattr(mpu, f"get_{name}_group")() is group
        assert getattr(mpu, f"get_{name}_rank")() == group.rank()
        assert getattr(mpu, f"get_{name}_world_size")() == group.size()
    assert mpu.get_data_parallel_group_ranks() == dist.get_process_group_ranks(mesh.group("data", "sequence"))
    assert mpu.get_data_parallel_world_size() * mpu.get_model_parallel_world_size() == dist.get_world_size()


@on_each_mesh
def test_to_deepspeed_data_is_data_x_sequence(ranks, size, given, degrees):
    ranks(size, _mpu, given)


def _device_mesh(given: dict[str, int], degrees: dict[str, int]) -> None:
    mesh = dsp.Mesh(**given)
    seen = mesh.device_mesh
    assert seen.mesh_dim_names == AXES
    assert dict(zip(AXES, seen.mesh.shape, strict=True)) == degrees
    for axis in AXES:
        assert seen.get_group(axis) is mesh.group(axis)
        assert seen[axis].mesh.tolist() == dist.get_process_group_ranks(mesh.group(axis))
        assert seen.get_local_rank(axis) == mesh.rank(axis)


@on_each_mesh
def test_device_mesh_has_the_same_groups(ranks, size, given, degrees):
    ranks(size, _device_mesh, given, degrees)


def _initialize() -> None:
    x = torch.arange(8.0)
    with pytest.raises(dsp.UsageError, match="no current mesh"):
        dsp.split(x, dim=0)
    other = dsp.Mesh(tensor=2)
    with pytest.raises(dsp.UsageError, match="no current mesh"):
        dsp.split(x, dim=0)
    config = {"sequence_parallel": {"size": 2}, "train_batch_size": 4}
    mesh = dsp.initialize(config)
    assert mesh is not other
    assert dsp.initialize(config) is mesh
    assert dsp.initialize({**config, "mesh": {"tensor": 1}}) is mesh
    for wrong in ({}, {**config, "mesh": {"tensor": 2}}, {"sequence_parallel": {"size": 4}}):
        with pytest.raises(dsp.UsageError, match=r"before with other degrees.*sequence=2"):
            dsp.initialize(wrong)
    group = mesh.group("sequence")
    shard = dsp.split(x, dim=0)
    assert torch.equal(shard, x.tensor_split(2)[group.rank()])
    assert torch.equal(dsp.gather(shard, dim=0, size=8), x)
    assert dsp.mean(shard, dim=0, size=8) == 3.5
    y = dsp.split(x.view(2, 4), dim=0)
    assert torch.equal(dsp.switch(y, gather=0, split=1, size=2), x.view(2, 4).tensor_split(2, 1)[group.rank()])
    assert dsp.mean_loss(shard) == dsp.mean_loss(shard, group=group)


def test_initialize_makes_one_current_mesh(ranks):
    ranks(4, _initialize)


def _does_not_fit() -> None:
    with pytest.raises(dsp.UsageError, match=r"world size 3 .*= 2"):
        dsp.initialize({"sequence_parallel": {"size": 2}})
    assert _sum_of_ranks(dist.group.WORLD) == 3  # nobody hangs, and a right call works
    assert dsp.initialize({"sequence_parallel": {"size": 3}}).size("sequence") == 3


def test_a_mesh_that_does_not_fit_is_refused_on_every_rank(ranks):
    ranks(3, _does_not_fit)


def _indices(given: dict[str, int], samples: int) -> tuple[int, list[int], list[int]]:
    mesh = dsp.Mesh(**given)
    sampler = dsp.sampler(range(samples), mesh)
    first = list(sampler)
    sampler.set_epoch(1)
    return mesh.rank("data"), first, list(sampler)


@pytest.mark.parametrize(("given", "data"), [({"sequence": 2}, 2), ({"tensor": 2, "sequence": 2}, 1), ({}, 4)])
def test_a_sequence_group_reads_the_same_samples_and_data_ranks_others(ranks, given, data):
    results = ranks(4, _indices, given, 12)
    for epoch in (1, 2):
        by_data: dict[int, set[tuple[int, ...]]] = {}
        for result in results:
            by_data.setdefault(result[0], set()).add(tuple(result[epoch]))
        assert sorted(by_data) == list(range(data))
        assert all(len(orders) == 1 for orders in by_data.values())
        assert sorted(index for (order,) in by_data.values() for index in order) == list(range(12))
    assert results[0][1] != results[0][2], "an epoch shuffles anew"


def _draws(given: dict[str, int], seed: int) -> tuple[tuple[int, ...], list[float], list[float]]:
    mesh = dsp.Mesh(**given)
    draws = []
    for _ in range(2):
        dsp.seed(mesh, seed)
        draws.append(torch.cat([torch.rand(4), nn.Dropout(0.5)(torch.ones(64))]).tolist())
    return tuple(mesh.rank(axis) for axis in ("pipe", "data", "sequence")), *draws


@pytest.mark.parametrize("given", [{"tensor": 2, "sequence": 2}, {"sequence": 2}, {"pipe": 2, "data": 2}])
def test_noise_is_equal_where_ranks_hold_copies(ranks, given):
    results = ranks(4, _draws, given, 1234)
    for one, first, second in results:
        assert first == second
        for other, draws, _ in results:
            assert (draws == first) == (other == one)
    assert ranks(4, _draws, given, 1235)[0][1] != results[0][1]


def _plain_engine(zero: int, sequence: int) -> int:
    import deepspeed

    mesh = dsp.Mesh(sequence=sequence)
    model = nn.Linear(2, 2)
    launch.start_deepspeed("cpu")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
        mpu=mesh.mpu,
    )
    return engine.train_batch_size()


def _refused_engine(zero: int) -> None:
    with pytest.raises(dsp.UsageError, match=r"sequence=2 would count .* call dsp.deepspeed_initialize\(\.\.\., mesh=mesh\)"):
        _plain_engine(zero, sequence=2)
    assert _sum_of_ranks(dist.group.WORLD) == 1  # both came here, and no collective of the engine is left between them


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_engine_that_miscounts_batches_is_refused(ranks, zero):
    ranks(2, _refused_engine, zero)


def test_plain_deepspeed_takes_a_mesh_without_a_sequence_axis(ranks):
    assert ranks(2, _plain_engine, 1, sequence=1) == [2, 2]
