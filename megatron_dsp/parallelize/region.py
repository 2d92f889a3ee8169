"""The sharded part of a model's forward: what its hooks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import RankError, UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.parallelize.pattern import Pattern, parse
from megatron_dsp.parallelize.plan import Key, Needs, Plan
from megatron_dsp.parallelize.routes import Route, Routes, find_routes
from megatron_dsp.reshard import gather, split, switch

Agree = Callable[[Exception | None], None]


class Move(NamedTuple):
    """A tensor on its way from one layout to another; a layout is the name of the sharded dim, None is whole."""

    x: Tensor
    pattern: Pattern
    sizes: Mapping[str, int]  # of each of its named dims, before the move
    source: str | None
    target: str | None


@dataclass
class _Forward:
    """How far a forward has come. Only refusals depend on it."""

    entered: bool = False
    left: bool = False
    calls: int = 0


class Region:
    """Global sizes of the last forward, and the layouts that follow from them.

    They outlast the forward, as modules may be computed again in backward. Should another forward with other sizes have come in
    between, the shapes do not fit, which is refused.

    ``agree`` is called before anything is moved, with what is wrong on this rank, if something is.
    """

    def __init__(self, plan: Plan, planned: Mapping[str, Needs], group: dist.ProcessGroup, agree: Agree | None = None):
        self._plan, self._planned, self._group, self._agree = plan, planned, group, agree
        self._order = tuple(planned)
        self._sizes: dict[str, int] = {}
        self._routes: Routes | None = None
        self._found: dict[tuple[tuple[tuple[str, int], ...], int], Routes] = {}
        self._forward: _Forward | None = None

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

    def enter(self, where: str, x: Any) -> str:
        """Take the global sizes from the activation ``x``, which every rank holds whole; returns the dim to shard."""
        forward = self._running(where)
        if forward is not None:
            if forward.entered:
                raise UsageError(f"{where}: the region is entered twice in a forward; enter where it happens once")
            forward.entered = True
        pattern = parse(next(iter(self._plan.enter.tensors.values())))
        sizes = self._fit(f"{where}: the activation should be whole", x, pattern, {})
        self._sizes = {dim: sizes[dim] for dim in self._plan.known}
        channels = [size for dim, size in sizes.items() if dim not in self._sizes]
        bytes_per_position = x.element_size() * prod(channels)
        key = tuple(self._sizes.items()), bytes_per_position
        if key not in self._found:
            self._found[key] = find_routes(
                self._plan, self._planned, self._sizes, bytes_per_position=bytes_per_position, ranks=self._group.size()
            )
        self._routes = self._found[key]
        return self._routes.start

    def leave(self, where: str) -> str:
        """The activation is to become whole; returns the dim that is sharded."""
        forward = self._running(where)
        if forward is not None:
            self._inside(where, forward)
            if self._plan.switching == "lazy" and forward.calls < len(self._order):
                raise UsageError(f"{where}: the region is left before module {self._order[forward.calls]!r} has run")
            forward.left = True
        return self.routes.end

    def route(self, name: str) -> Route:
        """Of the planned module ``name``, which is called now."""
        where = f"module {name!r}"
        forward = self._running(where)
        if forward is not None:
            self._inside(where, forward)
            if self._plan.switching == "lazy":
                expected = self._order[forward.calls] if forward.calls < len(self._order) else "(leave)"
                if name != expected:
                    raise UsageError(
                        f"{where} is called where {expected!r} is next; switching='lazy' is for modules that are called once "
                        "each, in the order of named_modules: use 'around'"
                    )
            forward.calls += 1
        return self.routes.modules[name]

    @property
    def routes(self) -> Routes:
        """Those of the last forward."""
        if self._routes is None:
            raise UsageError("no forward has entered the sharded region yet")
        return self._routes

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
            raise UsageError(f"{where} is called before the region is entered at {self._plan.enter.module!r}; enter earlier")
        if forward.left:
            raise UsageError(f"{where} is called after the region was left; leave later")

    def local(self, dim: str, sharded: str | None) -> int:
        """The size of ``dim`` on this rank where ``sharded`` is sharded."""
        if dim != sharded:
            return self._sizes[dim]
        start, stop = shard_range(self._sizes[dim], self._group.size(), self._group.rank())
        return stop - start

    def move(self, where: str, x: Any, pattern: Pattern, source: str | None, target: str | None) -> Move:
        """What is to move; a dim that ``pattern`` does not name leaves the tensor whole. Errors: RankError for other shapes."""
        known = {dim: self.local(dim, source) for dim in self._sizes}
        layout = "whole" if source is None else f"the shard of {source}={self._sizes[source]}"
        sizes = self._fit(f"{where} should be {layout}", x, pattern, known)
        source, target = (dim if dim in pattern.names else None for dim in (source, target))
        return Move(x, pattern, sizes, source, target)

    def local_size(self, where: str, value: Any, dim: str, route: Route) -> int:
        """The size of ``dim`` in a module. Errors: RankError where ``value`` is not that outside the module."""
        expected = {self._sizes[dim], self.local(dim, route.before)}
        if value not in expected:
            raise RankError(f"{where} is {value!r}, but the size of {dim} is {' or '.join(map(str, sorted(expected)))}")
        return self.local(dim, route.inside)

    def moved(self, moves: Mapping[Key, Move], stage: str) -> dict[Key, Tensor]:
        """Each in its new layout, by keep, switch, split or gather; collective."""
        return {key: self._moved(move, stage) for key, move in moves.items()}

    def _moved(self, move: Move, stage: str) -> Tensor:
        pattern, source, target = move.pattern, move.source, move.target
        if source == target:
            return move.x
        x, names = pattern.unflatten(move.x, move.sizes), pattern.names
        if source is None:
            x = split(x, dim=names.index(str(target)), group=self._group)
        elif target is None:
            x = gather(x, dim=names.index(source), size=self._sizes[source], group=self._group, stage=stage)
        else:
            dims = {"gather": names.index(source), "split": names.index(target)}
            x = switch(x, **dims, size=self._sizes[source], group=self._group, stage=stage)
        return pattern.flatten(x)

    def _fit(self, where: str, x: Any, pattern: Pattern, known: Mapping[str, int]) -> dict[str, int]:
        if not isinstance(x, Tensor):
            raise UsageError(f"{where}, {pattern.text!r}, but is a {type(x).__name__}; the plan names tensors there")
        try:
            return pattern.sizes(x.shape, known)
        except ValueError as error:
            raise RankError(f"{where}, {pattern.text!r}, but has shape {tuple(x.shape)}: {error}") from None
