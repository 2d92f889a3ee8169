"""One rank of a world that is not there: fake process groups, and what a pass on fake tensors keeps and sends.

Fake tensors have shapes and no data, and fake process groups have ranks and no peers. So any machine can run a model as any
rank of a world of any size, through the code that the real rank would run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import collectives
from megatron_dsp.reshard.labels import Label


@contextmanager
def fake_world(size: int, rank: int) -> Iterator[None]:
    """In the block, torch.distributed is started as ``rank`` of ``size``, and its collectives do nothing.

    Errors: UsageError where torch.distributed runs already.
    """
    if dist.is_initialized():
        raise UsageError("torch.distributed runs already, and a fake world takes its place; start it in a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Collective(NamedTuple):
    """A collective of a group, in values that are equal on all of its ranks.

    Attributes:
        axis: of the mesh.
        ranks: of the group.
        label: its operation, and the stage that it serves.
        shapes: of the whole tensors, of which each rank has or gets its shard.
        dims: the dim that becomes whole and the one that is then sharded, -1 where there is none.
    """

    axis: str
    ranks: tuple[int, ...]
    label: Label
    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, int]


class Watch(TorchDispatchMode):
    """Counts what runs in its block: memory of tensors that are made there, and the collectives of `megatron_dsp.reshard`.

    ``parameters`` were there before, and are not counted where views of them are made.

    Fake implementations of operators count nothing, so that compiled graphs are not counted when they are traced. This enters
    them in the ledger, by the formulas of real ones.

    Attributes:
        collectives: in the order in which they were issued.
        live: bytes of tensors that were made in the block and are still there.
        peak: the most that there was of it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary({parameter.untyped_storage(): True for parameter in parameters})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(function, args)
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._keep(x.untyped_storage())
        return result

    def _keep(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.live -= size

    def _note(self, function: Any, args: Any) -> None:
        described = collectives.describe(function, args)
        if described is not None:
            exchange, label, about = described
            exchange.count(label, about.sent)
            ranks = tuple(dist.get_process_group_ranks(exchange.group))
            self.collectives.append(Collective(exchange.description, ranks, label, about.shapes, about.dims))


class SavedTensors:
    """Counts, in its block, the bytes that autograd keeps for backward: each storage once, those of ``parameters`` not at all.

    Attributes:
        live: bytes that are kept now.
        peak: the most that were kept at a time.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.live = self.peak = 0
        self._parameters = {x.untyped_storage()._cdata for x in parameters}
        self._uses: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(partial(_Saved, self), attrgetter("tensor"))

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def change(self, tensor: Tensor, uses: int) -> None:
        """Note that autograd keeps ``tensor`` once more (1) or less (-1)."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._parameters:
            return
        before = self._uses[storage._cdata]
        self._uses[storage._cdata] += uses
        self.live += ((before + uses > 0) - (before > 0)) * storage.nbytes()
        self.peak = max(self.peak, self.live)


class _Saved:
    """A tensor that autograd keeps: autograd lets go of this object when it lets go of the tensor."""

    def __init__(self, counts: SavedTensors, tensor: Tensor) -> None:
        self.tensor, self._counts = tensor, counts
        counts.change(tensor, 1)

    def __del__(self) -> None:
        self._counts.change(self.tensor, -1)
