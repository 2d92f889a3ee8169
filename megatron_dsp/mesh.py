"""Degrees -> rank grid -> groups, and what DeepSpeed and torch see of them.

Ranks are laid out innermost first: tensor, sequence, data, pipe. Tensor collectives are the most frequent, so their ranks
are neighbours; then the sequence axis's switches; gradients over data once a step; pipeline sends least.
"""

from __future__ import annotations

import math
import socket
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_dsp import launch
from megatron_dsp.errors import UsageError
from megatron_dsp.megatron_groups import groups_of

AXES = ("pipe", "data", "sequence", "tensor")  # outermost first: the dims of the grid

# The groups that a mesh makes: each axis; the ranks that average gradients; those that run the same layers and so call modules
# together; and DeepSpeed's model-parallel ranks.
_GROUPS = (
    ("tensor",),
    ("sequence",),
    ("data",),
    ("pipe",),
    ("data", "sequence"),
    ("data", "sequence", "tensor"),
    ("pipe", "tensor"),
)


class RankGrid:
    """The arithmetic of a mesh for any world size; needs no processes."""

    def __init__(self, world_size: int, *, tensor: int = 1, pipe: int = 1, sequence: int = 1, data: int | None = None):
        if world_size < 1:
            raise UsageError(f"world size {world_size} must be at least 1")
        degrees = {"tensor": tensor, "pipe": pipe, "sequence": sequence}
        if data is not None:
            degrees["data"] = data
        for axis, degree in degrees.items():
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                raise UsageError(f"{axis}={degree!r}: a degree is a whole number of at least 1")
        product = math.prod(degrees.values())
        text = " x ".join(f"{axis} {degree}" for axis, degree in degrees.items())
        if data is None and world_size % product:
            raise UsageError(
                f"world size {world_size} is not a multiple of {text} = {product}; start a multiple of {product} ranks, "
                "or lower a degree"
            )
        if data is not None and world_size != product:
            raise UsageError(f"world size {world_size} is not {text} = {product}; start {product} ranks, or change a degree")
        self.world_size = world_size
        self.degrees: Mapping[str, int] = {**degrees, "data": world_size // product if data is None else data}
        self.ranks = np.arange(world_size).reshape([self.degrees[axis] for axis in AXES])

    def coordinate(self, rank: int, axis: str) -> int:
        """The position of ``rank`` along one axis."""
        return int(np.unravel_index(rank, self.ranks.shape)[AXES.index(axis)])

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups along these axes: in each, the ranks differ only there, in the grid's order."""
        unknown = set(axes) - set(AXES)
        if unknown or not axes:
            raise UsageError(f"no axis {', '.join(sorted(unknown)) or '(none given)'}; a mesh has {', '.join(AXES)}")
        kept = [AXES.index(axis) for axis in AXES if axis in axes]
        others = [i for i in range(len(AXES)) if i not in kept]
        size = math.prod(self.degrees[axis] for axis in set(axes))
        return self.ranks.transpose(others + kept).reshape(-1, size).tolist()

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """The one of these groups that ``rank`` is in."""
        return next(ranks for ranks in self.groups(*axes) if rank in ranks)


class Mesh:
    """The process groups of this rank. ``data`` fills the world where it is not given.

    Starts torch.distributed if nobody has (``launch.start``). Collective: every rank makes the same meshes in the same
    order, and has as many other groups by then (torch's names of new ones count them, and ranks would wait for each other
    under different names). Raises UsageError, on every rank, where the degrees do not fit the world size.
    """

    def __init__(self, *, tensor: int = 1, pipe: int = 1, sequence: int = 1, data: int | None = None):
        process = launch.start()
        backends = dist.get_backend_config(dist.group.WORLD)
        if "cpu:" not in backends:
            raise UsageError(
                f"torch.distributed was started with {backends} alone, but ranks also agree on tensors on the CPU; start it "
                'with init_process_group("cpu:gloo,cuda:nccl"), or leave it to dsp.initialize or dsp.Mesh'
            )
        grid = RankGrid(dist.get_world_size(), tensor=tensor, pipe=pipe, sequence=sequence, data=data)
        self._take(process, grid, {axes: _make_group(grid, axes) for axes in _GROUPS})

    @classmethod
    def from_megatron(cls, source: Any) -> Mesh:
        """The mesh of a megatron-core job: its own groups, of which the context-parallel one is the sequence group.

        ``source`` is ``megatron.core.parallel_state`` after ``initialize_model_parallel``, or a ``ProcessGroupCollection``
        with at least tp, cp, dp and pp. Groups that it has not got are made: every rank calls this. Does not become current.

        Errors: UsageError where the groups are not there yet, where ranks are in another order than Megatron's default
        (tp-cp-ep-dp-pp), and with expert parallelism.
        """
        groups = groups_of(source)
        grid = RankGrid(dist.get_world_size(), **{axis: groups[(axis,)].size() for axis in AXES})
        for axes, group in groups.items():
            expected, found = grid.group_of(dist.get_rank(), *axes), dist.get_process_group_ranks(group)
            if found != expected:
                raise UsageError(
                    f"Megatron's group over {' x '.join(axes)} has ranks {found}, where a mesh has {expected}; initialise "
                    'Megatron with its default order="tp-cp-ep-dp-pp"'
                )
        for axes in _GROUPS:
            if axes not in groups:
                # All ranks meet: torch names groups that only their members know of after the number of groups that a rank
                # has, and Megatron gives some ranks more than others.
                groups[axes], _ = dist.new_subgroups_by_enumeration(grid.groups(*axes), group_desc="+".join(axes))
        mesh = cls.__new__(cls)
        mesh._take(launch.discover(), grid, groups)
        return mesh

    def _take(self, process: launch.Process, grid: RankGrid, groups: Mapping[tuple[str, ...], dist.ProcessGroup]) -> None:
        self.process, self.grid, self._groups = process, grid, groups
        self._global_rank = dist.get_rank()
        self.sequence_group = groups[("sequence",)]  # what each primitive asks for
        tensor = groups[("tensor",)]
        if tensor is not groups[("sequence",)]:  # as one rank's may be in a ProcessGroupCollection
            _tensor_groups.add(tensor)

    def size(self, axis: str) -> int:
        """The degree of one axis: pipe, data, sequence or tensor."""
        return self.group(axis).size()

    def rank(self, axis: str) -> int:
        """This rank's position along one axis."""
        return self.group(axis).rank()

    def group(self, *axes: str) -> dist.ProcessGroup:
        """The group along one axis, or ``group("data", "sequence")``, over which gradients are averaged. Never None."""
        key = tuple(axis for axis in AXES if axis in axes)
        if key not in self._groups or len(key) != len(axes):
            known = ", ".join("(" + ", ".join(axes) + ")" for axes in _GROUPS)
            raise UsageError(f"a mesh has no group over {axes}; it has those over {known}")
        return self._groups[key]

    def hosts(self) -> tuple[str, ...]:
        """The host name of each rank; the same on all ranks, all of which must ask."""
        hosts: list[str] = [""] * self.grid.world_size
        dist.all_gather_object(hosts, socket.gethostname())
        return tuple(hosts)

    def within_host(self, axis: str) -> bool:
        """Whether no group along this axis crosses hosts; the same on all ranks, all of which must ask."""
        hosts = self.hosts()
        return all(len({hosts[rank] for rank in ranks}) == 1 for ranks in self.grid.groups(axis))

    @cached_property
    def mpu(self) -> DeepSpeedView:
        """What DeepSpeed may know of this mesh: to it, the data axis is data x sequence.

        Not for a pipeline (DeepSpeed wants None there), nor for samplers (see ``dsp.sampler``). With sequence > 1 an engine
        comes from ``dsp.deepspeed_initialize``: plain ``deepspeed.initialize(mpu=mesh.mpu)`` raises UsageError.
        """
        return DeepSpeedView(self)

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """The same groups as a torch DeviceMesh with dims pipe, data, sequence, tensor; for DDP, FSDP2 and DCP."""
        return DeviceMesh.from_group(
            [self.group(axis) for axis in AXES],
            device_type=self.device.type,
            mesh=torch.from_numpy(self.grid.ranks),
            mesh_dim_names=AXES,
        )

    @property
    def device(self) -> torch.device:
        """The device of this process: its GPU where torch.distributed has NCCL for it, else the CPU."""
        # Not get_backend: it is "undefined" where torch chose by itself.
        if "cuda:nccl" in dist.get_backend_config(dist.group.WORLD):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def __repr__(self) -> str:
        degrees = ", ".join(f"{axis}={self.grid.degrees[axis]}" for axis in reversed(AXES))
        return f"Mesh({degrees}; rank {self._global_rank} of {self.grid.world_size})"


def _make_group(grid: RankGrid, axes: tuple[str, ...]) -> dist.ProcessGroup:
    mine = grid.group_of(dist.get_rank(), *axes)
    # Only the members meet: at 512 ranks the world need not wait for each of hundreds of groups in turn.
    return dist.new_group(mine, use_local_synchronization=True, group_desc="+".join(axes))


class DeepSpeedView:
    """A Megatron-style ``mpu`` whose data-parallel group is data x sequence, so that every ZeRO stage averages gradients
    over both. It must not have any ``get_sequence_*`` or ``initialize_sequence_parallel``: with those DeepSpeed sums over
    the sequence group, or does not reduce there at all, depending on the stage (docs/contracts.md).

    An engine counts the sequence axis as data in batch sizes too. ``true_batch_sizes`` says that the caller corrects that, as
    ``dsp.deepspeed_initialize`` does; without it an engine is refused where the sequence axis has more than one rank.
    """

    def __init__(self, mesh: Mesh, *, true_batch_sizes: bool = False):
        self._mesh = mesh
        self._true_batch_sizes = true_batch_sizes

    def __getattr__(self, name: str) -> NoReturn:
        # Each new engine asks this of its mpu, with hasattr, before it communicates (deepspeed/utils/groups.py). That lets
        # no other error than AttributeError pass for "no".
        if name == "initialize_sequence_parallel" and not self._true_batch_sizes and self._mesh.size("sequence") > 1:
            raise UsageError(
                f"deepspeed.initialize(mpu=mesh.mpu) with sequence={self._mesh.size('sequence')} would count the sequence axis "
                "as data in batch sizes; call dsp.deepspeed_initialize(..., mesh=mesh) with the same arguments, without mpu="
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("data", "sequence")

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("pipe", "tensor")

    def get_model_parallel_rank(self) -> int:
        """Enumerates pipe x tensor, since DeepSpeed names its ``mp_rank_XX`` files after it."""
        return self.get_model_parallel_group().rank()

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.rank("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.size("tensor")

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.group("pipe")

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.rank("pipe")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.size("pipe")


_current: Mesh | None = None
_tensor_groups: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()  # of all meshes


def set_current(mesh: Mesh | None) -> None:
    """Make ``mesh`` the one whose sequence group the public functions default to; None forgets it."""
    global _current
    _current = mesh


def current() -> Mesh | None:
    """The mesh of ``dsp.initialize``, or None."""
    return _current


def sequence_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """``group``, or the current mesh's sequence group. Neither is an error: never the world."""
    if group is not None:
        if group in _tensor_groups:
            raise UsageError(
                "this is a mesh's tensor group, where activations and gradients are replicated and these adjoints would be "
                "wrong; pass the sequence group"
            )
        return group
    if _current is None:
        raise UsageError(
            "no group= and no current mesh: pass group=mesh.group('sequence'), or call dsp.initialize(config) first"
        )
    return _current.sequence_group
