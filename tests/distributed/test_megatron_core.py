"""Meshes of megatron-core's groups, and megatron-core's collectives, layers and data parallelism as the oracle for ours.

Each rank that runs these imports megatron-core, which takes seconds, once.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import jobs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import tensor as our
from megatron_dsp.mesh import AXES, Mesh, RankGrid
from megatron_dsp.tensor import TensorParallel

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="needs megatron-core: pip install megatron-core"
)

AXIS_NAMES = {"tp": ("tensor",), "cp": ("sequence",), "dp": ("data",), "pp": ("pipe",)}
NAMES = {**AXIS_NAMES, "dp_cp": ("data", "sequence"), "tp_dp_cp": ("data", "sequence", "tensor"), "mp": ("pipe", "tensor")}
# World sizes, and degrees of tensor, sequence and pipe; data fills the world.
ON_4 = [(4, degrees) for degrees in [(2, 2, 1), (1, 2, 1), (2, 1, 2), (1, 1, 1)]]
ON_8 = [pytest.param(8, degrees, marks=pytest.mark.long) for degrees in [(2, 2, 1), (2, 2, 2), (1, 4, 2)]]
T, B, S, C = 5, 2, 7, 6


@contextmanager
def megatron(tensor: int, sequence: int, pipe: int = 1, **options: Any) -> Iterator[ModuleType]:
    """megatron-core's parallel_state, initialised. What Megatron makes on the current GPU it makes on the CPU."""
    from megatron.core import parallel_state

    sizes = {"tensor_model_parallel_size": tensor, "context_parallel_size": sequence, "pipeline_model_parallel_size": pipe}
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes, **options)
    try:
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()


def _sum_of_ranks(group: dist.ProcessGroup) -> int:
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=group)
    return int(value)


def _groups(tensor: int, sequence: int, pipe: int) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank = dist.get_rank()
    with megatron(tensor, sequence, pipe) as state:
        everything = ProcessGroupCollection.use_mpu_process_groups()
        axes_alone = ProcessGroupCollection.use_mpu_process_groups(list(AXIS_NAMES))
        for source, has in ((state, NAMES), (everything, NAMES), (axes_alone, AXIS_NAMES)):
            mesh = Mesh.from_megatron(source)
            assert mesh.grid.degrees == RankGrid(dist.get_world_size(), tensor=tensor, sequence=sequence, pipe=pipe).degrees
            for name, axes in NAMES.items():
                group = mesh.group(*axes)
                assert (group is getattr(everything, name)) == (name in has)
                assert dist.get_process_group_ranks(group) == mesh.grid.group_of(rank, *axes)
                assert _sum_of_ranks(group) == sum(mesh.grid.group_of(rank, *axes))
            for axis, name in zip(AXES, ("pipeline_model", "data", "context", "tensor_model"), strict=True):
                assert mesh.rank(axis) == mesh.grid.coordinate(rank, axis) == getattr(state, f"get_{name}_parallel_rank")()
            assert mesh.mpu.get_data_parallel_group() is mesh.group("data", "sequence")
            assert mesh.mpu.get_model_parallel_world_size() == tensor * pipe
            assert mesh.device_mesh["sequence"].mesh.tolist() == state.get_context_parallel_global_ranks()
            with pytest.raises(dsp.UsageError, match="tensor group"):
                dsp.split(torch.zeros(4), dim=0, group=state.get_tensor_model_parallel_group())
            group, whole = mesh.group("sequence"), torch.arange(14.0).view(2, 7)
            moved = dsp.switch(dsp.split(whole, dim=0, group=group), gather=0, split=1, size=2, group=group)
            assert torch.equal(moved, whole.tensor_split(sequence, 1)[mesh.rank("sequence")])


@pytest.mark.parametrize(("size", "degrees"), ON_4 + ON_8)
def test_a_mesh_has_megatrons_groups(ranks, size, degrees):
    ranks(size, _groups, *degrees)


def _refusals() -> list[str]:
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    messages = []

    def refuse(source: Any) -> None:
        with pytest.raises(dsp.UsageError) as error:
            Mesh.from_megatron(source)
        messages.append(str(error.value))

    refuse(parallel_state)
    refuse(None)
    refuse(ProcessGroupCollection(tp=dist.group.WORLD, dp=dist.group.WORLD))
    for degrees, options in (
        ((1, 1, 2), {"order": "tp-cp-ep-pp-dp"}),
        ((2, 2, 1), {"order": "cp-tp-ep-dp-pp"}),
        ((1, 1, 1), {"expert_model_parallel_size": 2}),
    ):
        with megatron(*degrees, **options) as state:
            refuse(state)
            refuse(ProcessGroupCollection.use_mpu_process_groups())
    with megatron(1, 1):
        refuse(ProcessGroupCollection(**dict.fromkeys(AXIS_NAMES, dist.group.WORLD)))
    return messages


def test_refusals_name_the_value_the_rule_and_the_fix(ranks):
    order = r"Megatron's group over \w+ has ranks \[.*\], where a mesh has \[.*default order"
    signs = [
        r"megatron\.core\.parallel_state has no groups yet; call its initialize_model_parallel",
        "None has no process group tp, cp, dp, pp",
        r"ProcessGroupCollection\(.*\) has no process group cp, pp;",
        *[order] * 4,
        *["expert parallel size 2: .*expert_model_parallel_size=1"] * 2,
        "world size 4 is not .* = 256",
    ]
    for messages in ranks(4, _refusals):
        for sign, message in zip(signs, messages, strict=True):
            assert re.search(sign, message), message


# --- Collectives.

Mapping = Callable[[Tensor], Tensor]


def _mappings(group: dist.ProcessGroup) -> list[tuple[Mapping, Mapping]]:
    """Ours and Megatron's, of tensors [4, 3, 4]."""
    from megatron.core.tensor_parallel import mappings as their

    first, last = ({"dim": dim, "size": 4 * group.size()} for dim in (0, -1))
    pairs = [
        (our.copy_to_tensor, their.copy_to_tensor_model_parallel_region),
        (our.reduce_from_tensor, their.reduce_from_tensor_model_parallel_region),
        (partial(our.scatter_to_tensor, dim=-1), their.scatter_to_tensor_model_parallel_region),
        (partial(our.gather_from_tensor, **last), their.gather_from_tensor_model_parallel_region),
        (partial(our.scatter_to_tensor, dim=0), their.scatter_to_sequence_parallel_region),
        (
            partial(our.gather_from_tensor, **first),
            partial(their.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False),
        ),
        (partial(our.gather_from_sequence, **first), their.gather_from_sequence_parallel_region),
        (partial(our.gather_from_sequence, **last), their.all_gather_last_dim_from_tensor_parallel_region),
        (partial(our.reduce_scatter_to_sequence, dim=0), their.reduce_scatter_to_sequence_parallel_region),
        (partial(our.reduce_scatter_to_sequence, dim=-1), their.reduce_scatter_last_dim_to_tensor_parallel_region),
    ]
    return [(partial(ours, group=group), partial(theirs, group=group)) for ours, theirs in pairs]


def _compare_mappings(tensor: int) -> None:
    with megatron(tensor, 1) as state:
        generator = torch.Generator().manual_seed(dist.get_rank())
        for pair in _mappings(Mesh.from_megatron(state).group("tensor")):
            x = torch.randn(4, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
            outputs = [mapping(x.clone()) for mapping in pair]  # Megatron's all-reduce works in place
            upstream = torch.randn(outputs[0].shape, dtype=torch.float64, generator=generator)
            # In backward too, and where a tensor is not contiguous it drops the sum.
            gradients = [torch.autograd.grad(output, x, upstream.clone())[0] for output in outputs]
            torch.testing.assert_close(*outputs, rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("tensor", [2, 4])
def test_collectives_and_their_adjoints_are_megatrons(ranks, tensor):
    ranks(4, _compare_mappings, tensor)


# --- Layers, in a stage between two switches.


class OurMLP(nn.Module):
    def __init__(self, tensor: TensorParallel):
        super().__init__()
        self.tensor, self.up, self.down = tensor, tensor.column(C, 4 * C), tensor.row(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.tensor.enter(x))))


class MegatronMLP(nn.Module):
    """With the same weights."""

    def __init__(self, ours: OurMLP, mesh: Mesh, sequence_parallel: bool):
        super().__init__()
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        config = ModelParallelConfig(
            tensor_model_parallel_size=mesh.size("tensor"),
            context_parallel_size=mesh.size("sequence"),
            sequence_parallel=sequence_parallel,
            use_cpu_initialization=True,
            params_dtype=torch.float64,
        )
        options = {"config": config, "init_method": nn.init.zeros_, "tp_group": mesh.group("tensor"), "bias": True}
        self.up = ColumnParallelLinear(C, 4 * C, **options)
        self.down = RowParallelLinear(4 * C, C, input_is_parallel=True, skip_bias_add=False, **options)
        with torch.no_grad():
            for theirs, mine in zip(self.parameters(), ours.parameters(), strict=True):
                theirs.copy_(mine)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)  # these layers take three dims
        return self.down(torch.tanh(self.up(rows)[0]))[0].view_as(x)


class World:
    """A mesh of Megatron's groups, the same MLP in three makes, and every data rank's sample; all in fp64."""

    def __init__(self, state: ModuleType, sequence_dim: int | None = None):
        self.mesh = Mesh.from_megatron(state)
        self.group = self.mesh.group("sequence")
        parallel = TensorParallel(self.mesh.group("tensor"), sequence_dim=sequence_dim)
        made = []
        for tensor in (TensorParallel(), parallel):
            torch.manual_seed(0)
            made.append(OurMLP(tensor).double())
        self.whole, self.ours = made
        self.theirs = MegatronMLP(self.ours, self.mesh, sequence_dim is not None)
        self.samples = torch.randn(self.mesh.size("data"), T, B, S, C, dtype=torch.float64)
        self.weight = torch.rand(T, B, S, 1, dtype=torch.float64)
        self.frames = slice(*dsp.shard_range(T, self.group.size(), self.group.rank()))

    def own(self) -> Tensor:
        """The frames that this rank begins with."""
        return self.samples[self.mesh.rank("data")][self.frames].clone().requires_grad_()

    def stage(self, mlp: nn.Module, x: Tensor) -> Tensor:
        """``mlp`` works on running sums over time, all of which are there between two switches."""
        x = dsp.switch(x, gather=0, split=2, size=T, group=self.group)
        return dsp.switch(x + mlp(x.cumsum(0)), gather=2, split=0, size=S, group=self.group)

    def losses(self, y: Tensor) -> Tensor:
        """Of each token's channels."""
        return y.square() * self.weight[self.frames]

    def expected(self) -> tuple[Tensor, list[Tensor]]:
        """Of one process: this rank's part of the outputs and of the gradients of the mean over all samples."""
        y = torch.stack([x + self.whole(x.cumsum(0)) for x in self.samples])
        gradients = torch.autograd.grad((y.square() * self.weight).mean(), list(self.whole.parameters()))
        own = [our.own_shard(whole, like=mine) for whole, mine in zip(gradients, self.ours.parameters(), strict=True)]
        return y[self.mesh.rank("data")][self.frames], own


def _close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def _compare_stages(tensor: int, sequence: int) -> None:
    with megatron(tensor, sequence) as state:
        world = World(state)
        results = []
        for mlp in (world.ours, world.theirs):
            x = world.own()
            y = world.stage(mlp, x)
            gradients = torch.autograd.grad(dsp.mean_loss(world.losses(y), group=world.group), [x, *mlp.parameters()])
            results.append((y, *gradients))
        _close(*results)
        output, expected = world.expected()
        _close(results[1][0], output)
        over = world.mesh.group("data", "sequence")
        for gradient, whole in zip(results[1][2:], expected, strict=True):
            dist.all_reduce(gradient, group=over)
            _close(gradient / over.size(), whole)


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 2), (1, 2), (2, 1)])
def test_megatrons_layers_in_a_stage_compute_what_ours_and_one_process_do(ranks, tensor, sequence):
    ranks(4, _compare_stages, tensor, sequence)


def _compare_sequence_parallel_layers(tensor: int) -> None:
    with megatron(tensor, 1) as state:
        world = World(state, sequence_dim=0)
        generator = torch.Generator().manual_seed(dist.get_rank())
        x, upstream = (torch.randn(3, B, C, dtype=torch.float64, generator=generator) for _ in range(2))
        results = []
        for mlp in (world.ours, world.theirs):
            leaf = x.clone().requires_grad_()
            y = mlp(leaf)
            results.append([y, *torch.autograd.grad(y, [leaf, *mlp.parameters()], upstream)])
        # At its end, Megatron sums the gradients of biases of row-parallel layers, and of norms.
        dist.all_reduce(results[1][-1], group=world.mesh.group("tensor"))
        _close(*results)


def test_layers_under_sequence_parallel_are_megatrons(ranks):
    ranks(4, _compare_sequence_parallel_layers, 2)


# --- Megatron's data parallelism, and its ways to write a loss. What docs/megatron.md says of them.


def _mean(world: World, losses: Tensor) -> tuple[Any, ...]:
    return dsp.mean_loss(losses, group=world.group), torch.tensor(1), {}


def _legacy_mean(world: World, losses: Tensor) -> tuple[Any, ...]:
    return dsp.mean_loss(losses, group=world.group) / world.mesh.size("sequence"), {}


def _sum_and_count(world: World, losses: Tensor) -> tuple[Any, ...]:
    return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}


def _train(loss: Callable[[World, Tensor], tuple[Any, ...]], per_token: bool, tensor: int, sequence: int) -> float:
    """The largest error of the gradients that Megatron ends with, over the largest gradient."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    with megatron(tensor, sequence) as state:
        world = World(state)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=C,
            num_attention_heads=2,
            tensor_model_parallel_size=tensor,
            context_parallel_size=sequence,
            calculate_per_token_loss=per_token,
        )
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), world.theirs)
        micro_batches, tokens = 2, torch.zeros([], dtype=torch.int)
        for _ in range(micro_batches):
            y = world.stage(model, world.own())
            scaled, counted = forward_step_calc_loss(
                model,
                world.losses(y),
                lambda losses: loss(world, losses),
                config,
                vp_stage=None,
                collect_non_loss_data=False,
                num_microbatches=micro_batches,
                forward_data_store=[],
                cp_group_size=sequence,
                is_last_stage=True,
            )
            tokens += counted
            scaled.backward()
        groups = ProcessGroupCollection.use_mpu_process_groups()
        finalize_model_grads([model], tokens if per_token else None, groups)
        _, expected = world.expected()
        largest = max(gradient.abs().max() for gradient in expected)
        found = [parameter.main_grad for parameter in world.theirs.parameters()]
        return max(((a - b).abs().max() / largest).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 2), (1, 2)])
@pytest.mark.parametrize(("loss", "per_token"), [(_mean, False), (_legacy_mean, False), (_sum_and_count, True)])
def test_gradients_of_megatrons_data_parallelism_equal_one_process(ranks, loss, per_token, tensor, sequence):
    # Megatron divides by the number of tokens in fp32.
    assert max(ranks(4, _train, loss, per_token, tensor, sequence)) < (1e-7 if per_token else 1e-12)


# --- The example.


def _example(code: str) -> tuple[float, int]:
    from megatron.core import parallel_state

    names: dict[str, Any] = {}
    try:
        exec(code, names)
        return names["loss"].item(), names["mesh"].size("sequence")
    finally:
        parallel_state.destroy_model_parallel()


def test_the_example_of_the_docs_equals_one_process(ranks):
    (code, *_) = re.findall(r"```python\n(.*?)```", (jobs.ROOT / "docs" / "megatron.md").read_text(), flags=re.DOTALL)
    ((alone, _),) = ranks(1, _example, code.replace("parallel_size=2", "parallel_size=1"))
    results = ranks(4, _example, code)
    assert [sequence for _, sequence in results] == [2] * 4
    assert sum(loss for loss, _ in results) / 4 == pytest.approx(alone, rel=1e-6)
