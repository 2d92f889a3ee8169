"""Transports that show what code in chunks relies on, and mutations of that code. Used by test_overlap_mutations.py."""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import End, Move, Transport, as_bytes


class _Around:
    """A transport that passes on to a real one."""

    def __init__(self, real: Transport):
        self.real = real
        self.name, self.buffers = real.name, real.buffers


class RecordingTransport(_Around):
    """Writes down when which switch begins and ends, into ``log``, where stages write as well."""

    def __init__(self, real: Transport, log: list[str]):
        super().__init__(real)
        self.log, self._begun = log, 0

    def begin(self, moves: list[Move], label: Label, **how: Any) -> End:
        number, self._begun = self._begun, self._begun + 1
        self.log.append(f"b{number}")
        real_end = self.real.begin(moves, label, **how)

        def end() -> list[Tensor]:
            self.log.append(f"e{number}")
            return real_end()

        return end


class LateTransport(_Around):
    """Nothing arrives before its end is called: until then there is NaN in its place.

    Sources are read at the end, so that one changed before shows; with ``reads_early``, at the begin, as a real transport may.
    ``ends`` says of each transfer how often it was ended; once is right. Nothing is left under way by an end that is missing.
    """

    def __init__(self, real: Transport, rank: int, *, reads_early: bool = False):
        super().__init__(real)
        self._rank, self._reads_early = rank, reads_early
        self.ends: list[int] = []

    def begin(self, moves: list[Move], label: Label, **how: Any) -> End:
        results = [move.result(self._rank, self.buffers) for move in moves]
        places = [place for move, result in zip(moves, results, strict=True) for place in move.targets(result)]
        for place in places:
            place.fill_(torch.nan)
        pieces = self._pieces(moves, label) if self._reads_early else None
        number = len(self.ends)
        self.ends.append(0)

        @torch.no_grad()  # as in the autograd functions that begin: an end may be called by a destructor, in any mode
        def end() -> list[Tensor]:
            self.ends[number] += 1
            for place, piece in zip(places, self._pieces(moves, label) if pieces is None else pieces, strict=True):
                place.copy_(piece)
            return results

        return end

    def _pieces(self, moves: list[Move], label: Label) -> list[Tensor]:
        """What comes from each rank by each move, in memory of its own."""
        moves = [move._replace(into=None) for move in moves]
        results = self.real.begin(moves, label, at_once=True)()
        return [piece for move, result in zip(moves, results, strict=True) for piece in move.targets(result)]


class LateMessages:
    """Stands for torch.distributed in `TorchTransport`: what is received is there only after its ``wait``.

    Until then there are bytes 0xFF (NaN to floats). ``unwaited`` is how many messages nobody has waited for yet, ``freed`` how
    many of an all-to-all's were freed before that. `settle` brings what is under way to its end.
    """

    def __init__(self) -> None:
        self.unwaited = self.freed = 0
        self._pending: list[dist.Work] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def irecv(self, message: Tensor, **keywords: Any) -> _LateWork:
        arriving = torch.empty_like(message)
        work = self._late(dist.irecv(arriving, **keywords), lambda: message.copy_(arriving))
        as_bytes(message).fill_(0xFF)
        return work

    def isend(self, message: Tensor, **keywords: Any) -> _LateWork:
        return self._late(dist.isend(message.clone(), **keywords), lambda: None)

    def all_to_all(
        self,
        group: dist.ProcessGroup,
        arriving: Tensor,
        message: Tensor,
        arriving_splits: list[int],
        splits: list[int],
        options: dist.AllToAllOptions,
    ) -> _LateWork:
        """Of sends and receives. Nobody but the caller keeps what is sent alive."""
        own, ranks = group.rank(), group.size()
        received = arriving.split(arriving_splits or [arriving.numel() // ranks] * ranks)
        sent = message.split(splits or [message.numel() // ranks] * ranks)
        own_part, kept = sent[own].clone(), weakref.ref(message)
        others = [rank for rank in range(ranks) if rank != own]
        works = [self.irecv(received[rank], group=group, group_src=rank) for rank in others]
        works += [self.isend(sent[rank], group=group, group_dst=rank) for rank in others]

        def then() -> None:
            for work in works:
                work.wait()
            received[own].copy_(own_part)
            self.freed += kept() is None

        return _LateWork(then)

    def settle(self) -> None:
        while self._pending:
            self._pending.pop(0).wait()

    def _late(self, work: dist.Work | None, arrive: Callable[[], Any]) -> _LateWork:
        assert work is not None
        self._pending.append(work)
        self.unwaited += 1

        def then() -> None:
            self._pending.remove(work)  # Gloo waits twice for what is waited for twice
            work.wait()
            arrive()
            self.unwaited -= 1

        return _LateWork(then)


class _LateWork:
    def __init__(self, wait: Callable[[], None]):
        self.wait = wait


@contextmanager
def unraisable() -> Iterator[list[str]]:
    """The errors of destructors in the block, which Python prints and forgets."""
    errors: list[str] = []
    usual, sys.unraisablehook = sys.unraisablehook, lambda raised: errors.append(f"in {raised.object}: {raised.exc_value!r}")
    try:
        yield errors
        gc.collect()
    finally:
        sys.unraisablehook = usual


@contextmanager
def mutated(module: ModuleType, old: str = "", new: str = "") -> Iterator[ModuleType]:
    """In the block, the package uses a copy of ``module`` whose source has ``new`` for ``old``; the copy is given."""
    source = inspect.getsource(module)
    assert not old or source.count(old) == 1, f"{source.count(old)} times in {module.__name__}, to be mutated there:\n{old}"
    mutant = ModuleType(module.__name__)
    exec(compile(source.replace(old, new) if old else source, f"{module.__file__} (a copy)", "exec"), mutant.__dict__)
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for user in [user for name, user in sys.modules.items() if name.startswith("megatron_dsp.") and user is not module]:
            for name, value in list(vars(user).items()):
                made_there = isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__
                if value is module or made_there:
                    replaced.append((user, name, value))
                    setattr(user, name, mutant if value is module else getattr(mutant, value.__name__))
        yield mutant
    finally:
        for user, name, value in replaced:
            setattr(user, name, value)
