"""The sharded part of a model's forward: what its hooks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import RankError, UsageError
from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.parallelize.layout_changes import LayoutChange, change_layouts
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import ArgumentOrItem, Computed, LocalSize, Needs
from megatron_dsp.parallelize.pattern import Pattern, parse
from megatron_dsp.parallelize.routes import Route, Routes, find_routes, may_slice
from megatron_dsp.parallelize.slices import Range
from megatron_dsp.reshard import overlap_of
from megatron_dsp.reshard.stages.schedule import chunk_sizes

Agree = Callable[[Exception | None], None]


class Call(NamedTuple):
    """Of a planned module: what it needs this time, the layouts of its activation, and the slices in which it runs.

    ``slices`` are of the plan's independent dim; none: it runs whole.
    """

    needs: Needs
    route: Route
    slices: tuple[Range, ...]


@dataclass
class _ForwardState:
    """How far a forward has come. Only refusals depend on it, and which of a module's calls is the next."""

    entered: bool = False
    left: bool = False
    calls: Counter[str] = field(default_factory=Counter)


class ShardedForward:
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
        self._measured_sizes: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._routes: Routes | None = None
        self._routes_by_sizes: dict[tuple[tuple[tuple[str, int], ...], int, str | None], Routes] = {}
        self._bytes_per_position = 0
        self._layout = Layout((), ())  # of the activation, where it has entered
        self._slices: tuple[Range, ...] = ()  # of the plan's independent dim, in the last forward
        self._slice: Range | None = None  # in which a module runs now
        self.preferred: str | None = None
        self._progress: _ForwardState | None = None
        self.last_calls: dict[str, Call] = {}  # the last call of each planned module

    def begin(self, *_: Any) -> None:
        """The model is called."""
        self._progress = _ForwardState()

    def finish(self, *_: Any) -> None:
        """The model returns, or raises."""
        self._progress = None

    @contextmanager
    def agree_on_errors(self) -> Iterator[None]:
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

    def measure(self, where: str, tensors: Mapping[ArgumentOrItem, Any]) -> None:
        """Take global sizes from ``tensors``, by the patterns of the plan's ``sizes``."""
        assert self.plan.sizes is not None  # else there is no hook that calls this
        self._measured_sizes = {}
        for place, x in tensors.items():
            pattern = parse(self.plan.sizes.tensors[place])
            self._measured_sizes.update(self.fit(f"{where}: argument {place!r} should be", x, pattern, self._measured_sizes))

    def enter(self, where: str, x: Any) -> str:
        """Take the global sizes from the activation ``x``, which every rank holds whole; returns the dim to shard."""
        progress = self._current_progress(where)
        if progress is not None:
            if progress.entered:
                raise UsageError(f"{where}: the region is entered twice in a forward; enter where it happens once")
            progress.entered = True
        pattern = parse(next(iter(self.plan.enter.tensors.values())))
        measured = {dim: self._measured_sizes[dim] for dim in self.plan.known if dim in self._measured_sizes}
        if self.plan.sizes is not None and not measured:
            raise UsageError(f"{where}: module {self.plan.sizes.module!r}, from which sizes are taken, has not run before")
        sizes = measured | self.fit(f"{where}: the activation should be whole", x, pattern, measured)
        self._sizes = {dim: sizes[dim] for dim in self.plan.known}
        channels = [sizes[dim] for dim in pattern.names if dim not in self._sizes]
        self._bytes_per_position = x.element_size() * prod(channels)
        self._routes = self.routes_with(self.preferred)
        self._layout = Layout(pattern.names, tuple(sizes[dim] for dim in pattern.names), self._routes.start)
        return self._routes.start

    def choose_slices(self, x: Tensor) -> None:
        """Ask the group's overlap in how many slices modules run in this forward. ``x`` is the activation that has entered.

        Modules that are computed again in backward run as they did. Compiled ones run whole: a graph would order the ends of
        switches as it likes.
        """
        if torch._C._current_graph_task_id() != -1:
            return
        self._slices = ()
        overlap, dim = overlap_of(self.group), self.plan.independent
        if overlap is None or dim is None or self.group.size() == 1 or torch.compiler.is_compiling():
            return
        routes = [
            route
            for name, several in self._planned.items()
            for needs, route in zip(several, self.routes.modules[name], strict=True)
            if may_slice(needs, route, dim)
        ]
        if routes:
            layouts = [layout for layout, _ in groupby(chain([self.routes.start], *routes))]
            schedule = overlap.choose(self._layout, self.group, layouts, x, dim, ends=False)
            if schedule.cut_dim(self.routes.start) == dim:
                stops = [*accumulate(chunk_sizes(self._sizes[dim], schedule.chunks[dim], schedule.shrink))]
                self._slices = tuple(zip([0, *stops], stops, strict=False))

    @contextmanager
    def in_slice(self, part: Range | None) -> Iterator[None]:
        """In the block, a module runs in this slice of the plan's independent dim."""
        outer, self._slice = self._slice, part
        try:
            yield
        finally:
            self._slice = outer

    def routes_with(self, preferred: str | None) -> Routes:
        """Those of the last sizes, with a dim that is ``preferred``."""
        key = tuple(self._sizes.items()), self._bytes_per_position, preferred
        if key not in self._routes_by_sizes:
            self._routes_by_sizes[key] = find_routes(
                self.plan,
                self._planned,
                self._sizes,
                bytes_per_position=self._bytes_per_position,
                ranks=self.group.size(),
                preferred=preferred,
            )
        return self._routes_by_sizes[key]

    def leave(self, where: str) -> str:
        """The activation is to become whole; returns the dim that is sharded."""
        progress = self._current_progress(where)
        if progress is not None:
            self._check_inside(where, progress)
            if self.plan.switching == "lazy" and progress.calls.total() < len(self._order):
                raise UsageError(f"{where}: the region is left before module {self._order[progress.calls.total()]!r} has run")
            progress.left = True
        return self.routes.end

    def call(self, name: str) -> Call:
        """Of the planned module ``name``, which is called now."""
        where = f"module {name!r}"
        progress, several = self._current_progress(where), self._planned[name]
        if progress is None and len(several) > 1:
            raise UsageError(
                f"{where} has needs by call, and is computed again in backward, where its calls cannot be told apart; run it "
                "without gradient checkpointing"
            )
        index = 0
        if progress is not None:
            self._check_inside(where, progress)
            if self.plan.switching == "lazy":
                self._check_order(where, name, progress)
            index = progress.calls[name] % len(several)
            progress.calls[name] += 1
        needs, route = several[index], self.routes.modules[name][index]
        slices = self._slices if may_slice(needs, route, self.plan.independent) else ()
        self.last_calls[name] = Call(needs, route, slices)
        return self.last_calls[name]

    def _check_order(self, where: str, name: str, progress: _ForwardState) -> None:
        done = progress.calls.total()
        expected = self._order[done] if done < len(self._order) else "(leave)"
        if name != expected:
            raise UsageError(
                f"{where} is called where {expected!r} is next; switching='lazy' is for modules that are called once each, in "
                "the order of named_modules: use 'around'"
            )

    @property
    def is_entered(self) -> bool:
        """Whether a forward is in the region."""
        return self._progress is not None and self._progress.entered and not self._progress.left

    def check_entered(self, where: str) -> None:
        """Errors: UsageError unless the region is entered and not left."""
        progress = self._current_progress(where)
        if progress is not None:
            self._check_inside(where, progress)

    @property
    def routes(self) -> Routes:
        """Those of the last forward."""
        if self._routes is None:
            raise UsageError("no forward has entered the sharded region yet")
        return self._routes

    @property
    def sizes(self) -> Mapping[str, int]:
        """The global sizes of dims in the last forward, or in the slice that runs."""
        return self.local_sizes(None)

    def _current_progress(self, where: str) -> _ForwardState | None:
        """The forward that is under way; None where backward computes a module again."""
        if torch._C._current_graph_task_id() != -1:
            return None
        if self._progress is None:
            raise UsageError(
                f"{where} runs outside a call of the model that was parallelized; call that, not its forward or parts"
            )
        return self._progress

    def _check_inside(self, where: str, progress: _ForwardState) -> None:
        if not progress.entered:
            raise UsageError(f"{where} is called before the region is entered at {self.plan.enter.module!r}; enter earlier")
        if progress.left:
            raise UsageError(f"{where} is called after the region was left; leave later")

    def own_range(self, dim: str) -> tuple[int, int]:
        """Where this rank's part of ``dim`` starts and stops, when it is sharded."""
        return shard_range(self._sizes[dim], self.group.size(), self.group.rank())

    def local_sizes(self, sharded: str | None) -> dict[str, int]:
        """The size of each dim on this rank where ``sharded`` is sharded, in the slice that runs."""
        local = dict(self._sizes)
        if self._slice is not None and self.plan.independent is not None:
            start, stop = self._slice
            local[self.plan.independent] = stop - start
        if sharded is not None:
            start, stop = self.own_range(sharded)
            local[sharded] = stop - start
        return local

    def layout_change(self, where: str, x: Any, pattern: Pattern, source: str | None, target: str | None) -> LayoutChange:
        """What is to move; a dim that ``pattern`` does not name leaves the tensor whole. Errors: RankError for other shapes."""
        layout = "whole" if source is None else f"the shard of {source}={self._sizes[source]}"
        sizes = self.fit(f"{where} should be {layout}", x, pattern, self.local_sizes(source))
        source, target = (dim if dim in pattern.names else None for dim in (source, target))
        return LayoutChange(x, pattern, sizes, source, target, 0 if source is None else self._sizes[source])

    def sizes_for_attributes(self, sharded: str) -> dict[str, int]:
        """As `local_sizes`, but for the independent dim: attributes are the same in all slices of it."""
        return {dim: size for dim, size in self.local_sizes(sharded).items() if dim != self.plan.independent}

    def local_value(self, where: str, value: Any, side: LocalSize | Computed, before: str, sizes: Mapping[str, int]) -> Any:
        """What a module that sees ``sizes`` gets instead of ``value``.

        Errors: RankError where that is not the size outside the module, UsageError for a dim that has no size here.
        """
        if isinstance(side, Computed):
            try:
                return side.value(sizes)
            except KeyError as error:
                raise UsageError(f"{where}: its Computed asks for the size of {error}; there are {', '.join(sizes)}") from error
        expected = {self._sizes[side.dim], self.local_sizes(before)[side.dim]}
        if value not in expected:
            given = " or ".join(map(str, sorted(expected)))
            raise RankError(f"{where} is {value!r}, but the size of {side.dim} is {given}")
        return sizes[side.dim]

    def own_rows(self, where: str, table: Any, pattern: Pattern, sharded: str) -> Tensor:
        """This rank's part of a table, of which the first rows count where it has more than the input.

        Errors: as `layout_change`.
        """
        if (sharded,) not in [terms[0] for terms in pattern.dims if len(terms) == 1]:
            return change_layouts({where: self.layout_change(where, table, pattern, None, sharded)}, self.group, "")[where]
        others = {dim: size for dim, size in self._sizes.items() if dim != sharded}
        rows, whole = self.fit(f"{where} should be whole", table, pattern, others)[sharded], self._sizes[sharded]
        if rows < whole:
            raise RankError(f"{where}, {pattern.text!r}, has {rows} rows of {sharded}, and the input {whole}; it needs as many")
        start, stop = self.own_range(sharded)
        return table.narrow(pattern.dim_of(sharded), start, stop - start)

    def fit(self, where: str, x: Any, pattern: Pattern, known: Mapping[str, int]) -> dict[str, int]:
        """The size of each named dim of ``x``. Errors: RankError where its shape does not fit, UsageError for no tensor."""
        if not isinstance(x, Tensor):
            raise UsageError(f"{where}, {pattern.text!r}, but is a {type(x).__name__}; the plan names tensors there")
        try:
            return pattern.sizes(x.shape, known)
        except ValueError as error:
            raise RankError(f"{where}, {pattern.text!r}, but has shape {tuple(x.shape)}: {error}") from None
