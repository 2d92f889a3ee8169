"""What `parallelize` is told of a model: where its shards begin and end, and what its modules need. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal, NoReturn, TypeAlias

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.pattern import Pattern, parse

Key: TypeAlias = int | str  # an argument by position or by name; an item of an output


@dataclass(frozen=True)
class Slice:
    """A side input that every rank holds whole. The module gets the part that belongs to its shard."""

    pattern: str


@dataclass(frozen=True)
class Carried:
    """A side input that is sharded as the activation is outside the module, and moves along with it."""

    pattern: str


@dataclass(frozen=True)
class LocalSize:
    """A number: the size of ``dim``. The module gets the size of the part that it sees."""

    dim: str


@dataclass(frozen=True)
class Needs:
    """How a module takes its activation, and what it needs whole.

    Attributes:
        pattern: of the activation that goes in, and of the one that comes out where ``outputs`` is empty.
        whole: the dim or dims that it mixes.
        arguments: its side inputs, by position or by name. One that is not passed, or is None, is left alone.
        activation: the argument that is the activation.
        outputs: where it returns a tuple, list or dict: the items that are activations, with their patterns.
        least: elements of the sharded dim that it must find on each rank.
    """

    pattern: str
    whole: str | tuple[str, ...] = ()
    arguments: Mapping[Key, Slice | Carried | LocalSize] = field(default_factory=dict)
    activation: Key = 0
    outputs: Mapping[Key, str] = field(default_factory=dict)
    least: int = 1

    @property
    def mixes(self) -> tuple[str, ...]:
        """``whole`` as a tuple."""
        return (self.whole,) if isinstance(self.whole, str) else tuple(self.whole)

    @property
    def patterns(self) -> list[Pattern]:
        """All of its patterns, the activation's first."""
        sides = [side.pattern for side in self.arguments.values() if not isinstance(side, LocalSize)]
        return [parse(text) for text in (self.pattern, *sides, *self.outputs.values())]


@dataclass(frozen=True)
class Boundary:
    """Where activations become shards, or whole again: before a module, in its arguments; or after it, in its outputs.

    Attributes:
        module: its name in ``model.named_modules()``; "" is the model.
        tensors: which arguments, or items of the output (0 if it is one tensor), with their patterns; the activation first.
        after: after the module, not before it.
    """

    module: str
    tensors: Mapping[Key, str]
    after: bool = False


@dataclass(frozen=True)
class Plan:
    """Where the shard of an activation lies in a model.

    Attributes:
        modules: what modules need, by patterns of their names. A ``*`` stands for anything but a dot.
        enter: where activations become shards. The sizes of dims are taken from them, in each forward.
        leave: where they become whole again; None: they leave the model as shards of ``shard``.
        shard: the dim that is sharded between modules. With ``switching="lazy"`` it is that at the beginning, and None leaves
            it to the planner.
        shardable: the dims that may be sharded; empty: ``shard`` and all that some module needs whole.
        switching: "around": a module that needs the sharded dim whole gets it by a switch, and another one follows. "lazy": the
            modules hand one tensor on, and its shard moves as `planner.cheapest_plan` says.

    Errors: UsageError where its parts do not fit each other.
    """

    modules: Mapping[str, Needs]
    enter: Boundary
    leave: Boundary | None = None
    shard: str | None = None
    shardable: tuple[str, ...] = ()
    switching: Literal["around", "lazy"] = "around"

    def __post_init__(self) -> None:
        if not self.modules or not self.enter.tensors or (self.leave is not None and not self.leave.tensors):
            raise UsageError("a plan needs at least one module, one tensor to enter, and one to leave where it has leave=")
        if self.switching not in ("around", "lazy"):
            raise UsageError(f"switching={self.switching!r} must be 'around' or 'lazy'")
        if self.switching == "around" and self.shard is None:
            raise UsageError("switching='around' needs shard=, the dim that is sharded between modules")
        if self.switching == "lazy" and self.leave is None:
            raise UsageError(
                "switching='lazy' without leave= is not built: the layout at the end is the planner's; give leave="
            )
        activation = next(iter(self.enter.tensors.values()))
        if any(len(group) > 1 for group in parse(activation).groups):
            raise UsageError(
                f"enter: the sizes of dims that are flattened, as in {activation!r}, are not known; enter where none is"
            )
        self._check_boundary("enter", self.enter)
        if self.leave is not None:
            self._check_boundary("leave", self.leave)
        for name, needs in self.modules.items():
            self._check_module(f"modules[{name!r}]", needs)

    @property
    def dims(self) -> tuple[str, ...]:
        """The dims that may be sharded, in the order of preference between equals."""
        if self.shardable:
            return self.shardable
        named = [dim for needs in self.modules.values() for dim in needs.mixes]
        return tuple(dict.fromkeys([*([] if self.shard is None else [self.shard]), *named]))

    @property
    def known(self) -> tuple[str, ...]:
        """The dims whose sizes are taken from the activation that enters: all but its channels, which may change on the way."""
        names = parse(next(iter(self.enter.tensors.values()))).names
        return names if names[-1] in self.dims else names[:-1]

    def _check_boundary(self, where: str, boundary: Boundary) -> None:
        if self.switching == "lazy" and len(boundary.tensors) > 1:
            raise UsageError(
                f"{where}: switching='lazy' is built for one tensor that is handed on; it names {len(boundary.tensors)}"
            )
        for text in boundary.tensors.values():
            self._check_groups(where, parse(text))
        activation = next(iter(boundary.tensors.values()))
        for dim in self.dims:
            if dim not in parse(activation).names:
                raise UsageError(f"{where}: the first pattern, {activation!r}, must name {dim!r}, which may be sharded")

    def _check_module(self, where: str, needs: Needs) -> None:
        for key, side in needs.arguments.items():
            if not isinstance(side, (Slice, Carried, LocalSize)):
                raise UsageError(f"{where}: arguments[{key!r}] is {side!r}; say Slice(...), Carried(...) or LocalSize(...)")
            if isinstance(side, Carried) and self.switching == "lazy":
                raise UsageError(
                    f"{where}: arguments[{key!r}]: Carried with switching='lazy' is not built; pass it whole, as Slice"
                )
            if isinstance(side, LocalSize) and side.dim not in self.dims:
                raise UsageError(f"{where}: arguments[{key!r}]: {side.dim!r} is none of the dims {', '.join(self.dims)}")
        if needs.least < 1:
            raise UsageError(f"{where}: least={needs.least} must be at least 1; shards without elements are not served")
        named = parse(needs.pattern).names
        for dim in needs.mixes:
            if dim not in named:
                raise UsageError(f"{where}: whole={dim!r} is not in its pattern {needs.pattern!r}")
        if self.switching == "around" and self.shard not in named:
            raise UsageError(
                f"{where}: pattern {needs.pattern!r} does not name {self.shard!r}, the dim sharded between modules"
            )
        if not [dim for dim in self.dims if dim in named and dim not in needs.mixes]:
            raise UsageError(
                f"{where} needs {', '.join(needs.mixes)} whole, so none of {', '.join(self.dims)} can be sharded then; "
                "name another dim in shardable=, or leave before it"
            )
        for text in needs.outputs.values():
            if lost := [dim for dim in self.dims if dim in named and dim not in parse(text).names]:
                raise UsageError(
                    f"{where}: output {text!r} has no {lost[0]!r}; a module that reduces over a dim that may be sharded is not "
                    "built: use dsp.mean in the model, or leave before it"
                )
        for pattern in needs.patterns:
            self._check_groups(where, pattern)

    def _check_groups(self, where: str, pattern: Pattern) -> None:
        for group in pattern.groups:
            unknown = [name for name in group if name not in self.known]
            if len(unknown) > 1:
                raise UsageError(
                    f"{where}: the sizes of {' and '.join(unknown)} in {pattern.text!r} cannot be told apart; give flattened "
                    "dims that do not enter one name"
                )


def unknown_name(kind: str, name: str, known: list[str]) -> NoReturn:
    """Raise UsageError that suggests the nearest names."""
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    raise UsageError(f"{kind} {name!r} matches nothing; " + (f"near are {', '.join(near)}" if near else "nothing is near it"))
