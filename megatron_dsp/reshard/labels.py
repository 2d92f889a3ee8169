"""What a collective is for: an operation, and the stage that it serves. Ledgers and profiles make names of these values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import NamedTuple

import torch


class Operation(str, Enum):
    """What a collective does. A primitive's adjoint is an operation of its own."""

    SWITCH = "switch"
    SWITCH_ADJOINT = "switch adjoint"
    GATHER = "gather"
    GATHER_ADJOINT = "gather adjoint"
    MEAN = "mean"
    MEAN_ADJOINT = "mean adjoint"
    ALL_REDUCE = "all-reduce"
    ALL_REDUCE_ADJOINT = "all-reduce adjoint"
    TOKEN_COUNT = "token count"
    RING = "ring"
    RING_ADJOINT = "ring adjoint"
    TENSOR_ALL_REDUCE = "tensor all-reduce"
    TENSOR_ALL_REDUCE_ADJOINT = "tensor all-reduce adjoint"
    TENSOR_ALL_GATHER = "tensor all-gather"
    TENSOR_ALL_GATHER_ADJOINT = "tensor all-gather adjoint"
    TENSOR_REDUCE_SCATTER = "tensor reduce-scatter"
    TENSOR_REDUCE_SCATTER_ADJOINT = "tensor reduce-scatter adjoint"

    def __str__(self) -> str:
        return self.value

    @property
    def is_switch(self) -> bool:
        """Whether it moves a shard from one dim to another."""
        return self in (Operation.SWITCH, Operation.SWITCH_ADJOINT)


class StageName(NamedTuple):
    """The kind of a stage, as "temporal", and its number among those of its kind, where it has one."""

    kind: str = ""
    number: int | None = None

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind} {self.number}"


class Label(NamedTuple):
    """What a collective is for. ``operation`` is the value of an `Operation`: operators of torch carry strings."""

    operation: str
    kind: str = ""
    number: int | None = None

    @property
    def stage(self) -> StageName:
        """The stage that is served."""
        return StageName(self.kind, self.number)


_NO_STAGE = StageName()


class ProfileRange(NamedTuple):
    """A part of a step that a profiler sees: what is done ("stage", "begin switch"), and for which stage."""

    what: str
    stage: StageName

    def __str__(self) -> str:
        return f"{self.what} {self.stage}".rstrip()


# By its name in a profile, each range that a profiler was shown: profiles hold names alone.
_shown: dict[str, ProfileRange] = {}


def profile_range(what: str, stage: StageName = _NO_STAGE) -> AbstractContextManager[object]:
    """A range with a name where a profiler is on (NVTX under ``torch.autograd.profiler.emit_nvtx``), else nothing."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    shown = ProfileRange(what, stage)
    _shown[str(shown)] = shown
    return torch.profiler.record_function(str(shown))


def find_range(name: str) -> ProfileRange | None:
    """The range of this name in a profile of this process; None: it is none of ours."""
    return _shown.get(name)
