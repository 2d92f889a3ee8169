"""The sharded part of a model's forward: what its hooks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import RankError, UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.parallelize.needs import Computed, LocalSize, Needs, Place
from megatron_dsp.parallelize.pattern import Pattern, parse
from megatron_dsp.parallelize.plan import Plan
from megatron_dsp.parallelize.routes import Route, Routes, find_routes
from megatron_dsp.parallelize.shards import Move, moved

Agree = Callable[[Exception | None], None]


class Call(NamedTuple):
    """Of a planned module: what it needs this time, and the layouts of its activation."""

    needs: Needs
    route: Route


@dataclass
class _Forward:
    """How far a forward has come. Only refusals depend on it, and which of a module's calls is the next."""

    entered: bool = False
    left: bool = False
    calls: Counter[str] = field(default_factory=Counter)


class Region:
    """Global sizes of the last forward, and the layouts that follow from them.

    They outlast the forward, as modules may be computed again in backward. Should another forward with other sizes have come in
    between, the shapes do not fit, which is refused.

    ``agree`` is called before anything is moved, with what is wrong on this rank, if something is. For ``preferred``, which the
    next forward heeds, see `find_routes`.
    """

    def __init__(
        self, plan: Plan, planned: Mapping[str, tuple[Needs, ...]], group: dist.ProcessGroup, agree: Agree | None = None
    ):
        self.plan, self.group = plan, group
        self._planned, self._agree = planned, agree
        self._order = tuple(planned)
        self._measured: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._routes: Routes | None = None
        self._found: dict[tuple[tuple[tuple[str, int], ...], int, str | None], Routes] = {}
        self._bytes_per_position = 0
        self.preferred: str | None = None
        self._forward: _Forward | None = None
        self.called: dict[str, Call] = {}  # the last call of each planned module

    def begin(self, *_: Any) -> None:
        """The model is called."""
        self._forward = _Forward()

    def finish(self, *_: Any) -> None:
        """The model returns, or raises."""
        self._forward = None

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Around what a hook looks at before it moves something."""
        error: UsageError | None = None
        try:
            yield
        except UsageError as found:
            error = found
        if self._agree is not None:
            self._agree(error)
        if error is not None:
            raise error

    def measure(self, where: str, tensors: Mapping[Place, Any]) -> None:
        """Take global sizes from ``tensors``, by the patterns of the plan's ``sizes``."""
        assert self.plan.sizes is not None  # else there is no hook that calls this
        self._measured = {}
        for place, x in tensors.items():
            pattern = parse(self.plan.sizes.tensors[place])
            self._measured.update(self.fit(f"{where}: argument {place!r} should be", x, pattern, self._measured))

    def enter(self, where: str, x: Any) -> str:
        """Take the global sizes from the activation ``x``, which every rank holds whole; returns the dim to shard."""
        forward = self._running(where)
        if forward is not None:
            if forward.entered:
                raise UsageError(f"{where}: the region is entered twice in a forward; enter where it happens once")
            forward.entered = True
        pattern = parse(next(iter(self.plan.enter.tensors.values())))
        measured = {dim: self._measured[dim] for dim in self.plan.known if dim in self._measured}
        if self.plan.sizes is not None and not measured:
            raise UsageError(f"{where}: module {self.plan.sizes.module!r}, from which sizes are taken, has not run before")
        sizes = measured | self.fit(f"{where}: the activation should be whole", x, pattern, measured)
        self._sizes = {dim: sizes[dim] for dim in self.plan.known}
        channels = [sizes[dim] for dim in pattern.names if dim not in self._sizes]
        self._bytes_per_position = x.element_size() * prod(channels)
        self._routes = self.routes_with(self.preferred)
        return self._routes.start

    def routes_with(self, preferred: str | None) -> Routes:
        """Those of the last sizes, with a dim that is ``preferred``."""
        key = tuple(self._sizes.items()), self._bytes_per_position, preferred
        if key not in self._found:
            self._found[key] = find_routes(
                self.plan,
                self._planned,
                self._sizes,
                bytes_per_position=self._bytes_per_position,
                ranks=self.group.size(),
                preferred=preferred,
            )
        return self._found[key]

    def leave(self, where: str) -> str:
        """The activation is to become whole; returns the dim that is sharded."""
        forward = self._running(where)
        if forward is not None:
            self._inside(where, forward)
            if self.plan.switching == "lazy" and forward.calls.total() < len(self._order):
                raise UsageError(f"{where}: the region is left before module {self._order[forward.calls.total()]!r} has run")
            forward.left = True
        return self.routes.end

    def call(self, name: str) -> Call:
        """Of the planned module ``name``, which is called now."""
        where = f"module {name!r}"
        forward, several = self._running(where), self._planned[name]
        if forward is None and len(several) > 1:
            raise UsageError(
                f"{where} has needs by call, and is computed again in backward, where its calls cannot be told apart; run it "
                "without gradient checkpointing"
            )
        index = 0
        if forward is not None:
            self._inside(where, forward)
            if self.plan.switching == "lazy":
                self._in_order(where, name, forward)
            index = forward.calls[name] % len(several)
            forward.calls[name] += 1
        self.called[name] = Call(several[index], self.routes.modules[name][index])
        return self.called[name]

    def _in_order(self, where: str, name: str, forward: _Forward) -> None:
        done = forward.calls.total()
        expected = self._order[done] if done < len(self._order) else "(leave)"
        if name != expected:
            raise UsageError(
                f"{where} is called where {expected!r} is next; switching='lazy' is for modules that are called once each, in "
                "the order of named_modules: use 'around'"
            )

    @property
    def is_entered(self) -> bool:
        """Whether a forward is in the region."""
        return self._forward is not None and self._forward.entered and not self._forward.left

    def within(self, where: str) -> None:
        """Errors: UsageError unless the region is entered and not left."""
        forward = self._running(where)
        if forward is not None:
            self._inside(where, forward)

    @property
    def routes(self) -> Routes:
        """Those of the last forward."""
        if self._routes is None:
            raise UsageError("no forward has entered the sharded region yet")
        return self._routes

    @property
    def sizes(self) -> Mapping[str, int]:
        """The global sizes of dims in the last forward."""
        return self._sizes

    def _running(self, where: str) -> _Forward | None:
        """The forward that is under way; None where backward computes a module again."""
        if torch._C._current_graph_task_id() != -1:
            return None
        if self._forward is None:
            raise UsageError(
                f"{where} runs outside a call of the model that was parallelized; call that, not its forward or parts"
            )
        return self._forward

    def _inside(self, where: str, forward: _Forward) -> None:
        if not forward.entered:
            raise UsageError(f"{where} is called before the region is entered at {self.plan.enter.module!r}; enter earlier")
        if forward.left:
            raise UsageError(f"{where} is called after the region was left; leave later")

    def part(self, dim: str) -> tuple[int, int]:
        """Where this rank's part of ``dim`` starts and stops, when it is sharded."""
        return shard_range(self._sizes[dim], self.group.size(), self.group.rank())

    def local(self, sharded: str | None) -> dict[str, int]:
        """The size of each dim on this rank where ``sharded`` is sharded."""
        local = dict(self._sizes)
        if sharded is not None:
            start, stop = self.part(sharded)
            local[sharded] = stop - start
        return local

    def move(self, where: str, x: Any, pattern: Pattern, source: str | None, target: str | None) -> Move:
        """What is to move; a dim that ``pattern`` does not name leaves the tensor whole. Errors: RankError for other shapes."""
        layout = "whole" if source is None else f"the shard of {source}={self._sizes[source]}"
        sizes = self.fit(f"{where} should be {layout}", x, pattern, self.local(source))
        source, target = (dim if dim in pattern.names else None for dim in (source, target))
        return Move(x, pattern, sizes, source, target, 0 if source is None else self._sizes[source])

    def local_value(self, where: str, value: Any, side: LocalSize | Computed, before: str, inside: str) -> Any:
        """What a module gets instead of ``value``. Errors: RankError where that is not the size outside the module."""
        if isinstance(side, Computed):
            return side.value(self.local(inside))
        expected = {self._sizes[side.dim], self.local(before)[side.dim]}
        if value not in expected:
            sizes = " or ".join(map(str, sorted(expected)))
            raise RankError(f"{where} is {value!r}, but the size of {side.dim} is {sizes}")
        return self.local(inside)[side.dim]

    def rows(self, where: str, table: Any, pattern: Pattern, sharded: str) -> Tensor:
        """This rank's part of a table, of which the first rows count where it has more than the input. Errors: as `move`."""
        if (sharded,) not in [terms[0] for terms in pattern.dims if len(terms) == 1]:
            return moved({where: self.move(where, table, pattern, None, sharded)}, self.group, "")[where]
        others = {dim: size for dim, size in self._sizes.items() if dim != sharded}
        rows, whole = self.fit(f"{where} should be whole", table, pattern, others)[sharded], self._sizes[sharded]
        if rows < whole:
            raise RankError(f"{where}, {pattern.text!r}, has {rows} rows of {sharded}, and the input {whole}; it needs as many")
        start, stop = self.part(sharded)
        return table.narrow(pattern.dim_of(sharded), start, stop - start)

    def fit(self, where: str, x: Any, pattern: Pattern, known: Mapping[str, int]) -> dict[str, int]:
        """The size of each named dim of ``x``. Errors: RankError where its shape does not fit, UsageError for no tensor."""
        if not isinstance(x, Tensor):
            raise UsageError(f"{where}, {pattern.text!r}, but is a {type(x).__name__}; the plan names tensors there")
        try:
            return pattern.sizes(x.shape, known)
        except ValueError as error:
            raise RankError(f"{where}, {pattern.text!r}, but has shape {tuple(x.shape)}: {error}") from None
