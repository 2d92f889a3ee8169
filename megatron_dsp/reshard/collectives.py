"""The collectives, each once: how it runs, its fake for compilers, and what it moves, side by side.

They are torch operators, which torch.compile keeps in its graphs, and name their group by `Members.name`. They have no
gradients of their own: primitives.py and the tensor axis's mappings hold each beside its adjoint. Bytes are moved as bytes, so
every dtype travels, bitwise; only sums know their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import RankRanges, shard_range, shard_ranges
from megatron_dsp.reshard.exchange import (
    Exchange,
    Members,
    bytes_to_others,
    elements_to_others,
    exchange_of,
    find_exchange,
    in_words,
    resolve_flags,
    whole_in_words,
)
from megatron_dsp.reshard.labels import Label, profile_range
from megatron_dsp.reshard.transport.move import Move, as_bytes
from megatron_dsp.reshard.transport.pieces import pack, unpack

# torch 2.13 renames these two and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ROTATION_TAG = 0xD7  # keeps rotations apart from other messages between the same ranks
_MOST_SHAPES = 1024  # of which what was found is kept

_PLAIN = (Tensor, torch.nn.Parameter)  # the types of tensors that nobody dispatches anew

_library = torch.library.Library("megatron_dsp", "DEF")
_WHERE = "str group, str operation, str kind, int? number"


class Transfer(NamedTuple):
    """What a collective moves.

    Attributes:
        sent: bytes that leave this rank.
        shapes: of the whole tensors, of which each rank has or gets its shard; equal on all ranks, as are dims.
        dims: the dim that becomes whole and the one that is then sharded, -1 where there is none.
    """

    sent: int
    shapes: tuple[tuple[int, ...], ...]
    dims: tuple[int, int]


_describe: dict[torch._ops.OpOverload, Callable[..., Transfer]] = {}


def describe(operator: Any, arguments: Sequence[Any]) -> tuple[Exchange, Label, Transfer] | None:
    """Over which group, for what, and what it moves, where ``operator`` is one of these collectives; no communication."""
    if operator not in _describe:
        return None
    *about, group, operation, kind, number = arguments
    exchange = find_exchange(group)
    return exchange, Label(operation, kind, number), _describe[operator](exchange, *about)


def _define(schema: str, run: Callable, infer: Callable, described: Callable[..., Transfer]) -> Callable[..., Any]:
    """A function that is ``run``: as an operator, through torch's dispatcher, where a compiler, a mode or a subclass looks on.

    ``infer`` gives them its outputs' shapes without any communication. Where nobody does, dispatching would take a quarter of
    a switch's time on the host.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatron_dsp::{name}", infer, lib=_library)
    operator = getattr(torch.ops.megatron_dsp, name).default
    _describe[operator] = described

    def run_or_dispatch(tensors: Any, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return operator(tensors, *arguments)
        for x in (tensors,) if isinstance(tensors, Tensor) else tensors:
            if type(x) not in _PLAIN:
                return operator(tensors, *arguments)
        return run(tensors, *arguments)

    return run_or_dispatch


# --- switch: the shard of each tensor goes from dim ``gather``, of global size ``sizes``, to dim ``split``; one all-to-all.


def _run_switch(xs: list[Tensor], gather: int, split: int, sizes: list[int], group: str, *what: Any) -> list[Tensor]:
    exchange, label = find_exchange(group), Label(*what)
    moves, sent = [], 0
    for x, size in zip(xs, sizes, strict=True):
        key = x.shape, gather, split, size
        found = exchange.shapes.get(key)
        if found is None:
            found = _find_switch(exchange, x, gather, split, size)
            if len(exchange.shapes) >= _MOST_SHAPES:
                exchange.shapes.clear()
            exchange.shapes[key] = found
        dims_and_ranges, elements = found
        moves.append(Move(x, *dims_and_ranges))
        sent += elements * x.element_size()
    if torch.autograd._profiler_enabled():
        with profile_range(label.operation, label.stage):
            return exchange.begin(moves, label, sent, at_once=True)()
    return exchange.begin(moves, label, sent, at_once=True)()


def _find_switch(
    exchange: Exchange, x: Tensor, gather: int, split: int, size: int
) -> tuple[tuple[int, int, RankRanges, RankRanges], int]:
    """What a `Move` of ``x`` has beside it, and how many of its elements leave this rank."""
    gather, split = check_switch(exchange.members, x, gather, split, size)
    dims_and_ranges = gather, split, shard_ranges(size, exchange.size), shard_ranges(x.shape[split], exchange.size)
    return dims_and_ranges, elements_to_others(Move(x, *dims_and_ranges), exchange.rank)


def _infer_switch(xs: list[Tensor], gather: int, split: int, sizes: list[int], group: str, *what: Any) -> list[Tensor]:
    members = find_exchange(group).members
    results = []
    for x, size in zip(xs, sizes, strict=True):
        whole, sharded = check_switch(members, x, gather, split, size)
        shape = list(x.shape)
        shape[whole], shape[sharded] = size, _own_size(members, x.shape[sharded])
        results.append(x.new_empty(shape))
    return results


def _describe_switch(exchange: Exchange, xs: list[Tensor], gather: int, split: int, sizes: list[int]) -> Transfer:
    moves = [Move(x, *_find_switch(exchange, x, gather, split, size)[0]) for x, size in zip(xs, sizes, strict=True)]
    shapes = tuple(_whole(move.x, move.gather, size) for move, size in zip(moves, sizes, strict=True))
    return Transfer(bytes_to_others(moves, exchange.rank), shapes, (moves[0].gather, moves[0].split))


switch = _define(
    f"switch(Tensor[] xs, int gather, int split, SymInt[] sizes, {_WHERE}) -> Tensor[]",
    _run_switch,
    _infer_switch,
    _describe_switch,
)


# --- gather: the whole tensor, of which every rank has its shard of ``dim``, of global size ``size``; one all-gather.


def _run_gather(x: Tensor, dim: int, size: int, group: str, *what: Any) -> Tensor:
    exchange, label = find_exchange(group), Label(*what)
    if exchange.agreement is not None:
        exchange.agreement.check(in_words(label, whole_in_words(x, dim, size), f"dim {dim}"))
    send, ranges = resolve_flags(x).contiguous().view(-1), shard_ranges(size, exchange.size)
    whole = x.new_empty(_whole(x, dim, size))
    in_order = math.prod(whole.shape[:dim]) == 1
    received = whole.view(-1) if in_order else send.new_empty(whole.numel())
    if size % exchange.size == 0:
        _all_gather(as_bytes(received), as_bytes(send), group=exchange.group)
    else:
        width = received.numel() // size if size else 0
        parts = [as_bytes(part) for part in received.split([(stop - start) * width for start, stop in ranges.parts])]
        if x.is_cuda:
            dist.all_gather(parts, as_bytes(send), group=exchange.group)  # NCCL's: one launch, of a broadcast from each rank
        else:
            # Gloo's refuses uneven shards.
            parts[exchange.rank].copy_(as_bytes(send))
            works = [
                dist.broadcast(part, group=exchange.group, group_src=rank, async_op=True)
                for rank, part in enumerate(parts)
                if part.numel()
            ]
            for work in works:
                work.wait()
    exchange.count(label, _sent_by_gather(exchange, x))
    if not in_order:
        unpack(received, whole, dim, ranges)
    return whole


def _infer_gather(x: Tensor, dim: int, size: int, group: str, *what: Any) -> Tensor:
    return x.new_empty(_whole(x, dim, size))


def _sent_by_gather(exchange: Exchange, x: Tensor) -> int:
    return x.nbytes * (exchange.size - 1)


def _describe_gather(exchange: Exchange, x: Tensor, dim: int, size: int) -> Transfer:
    return Transfer(_sent_by_gather(exchange, x), (_whole(x, dim, size),), (dim, -1))


gather = _define(f"gather(Tensor x, int dim, SymInt size, {_WHERE}) -> Tensor", _run_gather, _infer_gather, _describe_gather)


# --- reduce_scatter: this rank's shard of ``dim`` of the sum over ranks.


def _run_reduce_scatter(x: Tensor, dim: int, group: str, *what: Any) -> Tensor:
    exchange, label = find_exchange(group), Label(*what)
    size, ranks = x.shape[dim], exchange.size
    if exchange.agreement is not None:
        exchange.agreement.check(in_words(label, whole_in_words(x, dim, size), f"dim {dim}"))
    ranges = shard_ranges(size, ranks)
    start, stop = ranges.parts[exchange.rank]
    shape = _whole(x, dim, stop - start)
    send = pack(resolve_flags(x), dim, ranges)
    exchange.count(label, _sent_by_reduce_scatter(exchange, x, dim))
    if size % ranks == 0:
        received = send.new_empty(torch.Size(shape).numel())
        _reduce_scatter(received, send, group=exchange.group)
        return received.view(shape)
    width = x.numel() // size * x.element_size() if size else 0
    parts = send.new_empty((ranks, *shape))
    splits = [(stop - start) * width for start, stop in ranges.parts]
    own = [splits[exchange.rank]] * ranks
    dist.all_to_all_single(as_bytes(parts), as_bytes(send), own, splits, group=exchange.group)
    return parts.sum(0)


def _infer_reduce_scatter(x: Tensor, dim: int, group: str, *what: Any) -> Tensor:
    members = find_exchange(group).members
    return x.new_empty(_whole(x, dim, _own_size(members, x.shape[dim])))


def _sent_by_reduce_scatter(exchange: Exchange, x: Tensor, dim: int) -> int:
    size = x.shape[dim]
    own = _own_size(exchange.members, size)
    return x.nbytes // size * (size - own) if size else 0


def _describe_reduce_scatter(exchange: Exchange, x: Tensor, dim: int) -> Transfer:
    return Transfer(_sent_by_reduce_scatter(exchange, x, dim), (tuple(x.shape),), (-1, dim))


reduce_scatter = _define(
    f"reduce_scatter(Tensor x, int dim, {_WHERE}) -> Tensor",
    _run_reduce_scatter,
    _infer_reduce_scatter,
    _describe_reduce_scatter,
)


# --- all_reduce: the sum over ranks.


def _run_all_reduce(x: Tensor, group: str, *what: Any) -> Tensor:
    exchange, label = find_exchange(group), Label(*what)
    if exchange.agreement is not None:
        exchange.agreement.check(in_words(label, f"{list(x.shape)} {x.dtype}"))
    total = resolve_flags(x).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=exchange.group)
    exchange.count(label, ring_all_reduce_bytes(x.nbytes, exchange.size))
    return total


def _infer_all_reduce(x: Tensor, group: str, *what: Any) -> Tensor:
    return x.new_empty(x.shape)


def _describe_all_reduce(exchange: Exchange, x: Tensor) -> Transfer:
    return Transfer(ring_all_reduce_bytes(x.nbytes, exchange.size), (tuple(x.shape),), (-1, -1))


def ring_all_reduce_bytes(size: int, ranks: int) -> int:
    """The bytes that leave each of ``ranks`` ranks in an all-reduce of ``size`` bytes: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) * size // ranks


all_reduce = _define(f"all_reduce(Tensor x, {_WHERE}) -> Tensor", _run_all_reduce, _infer_all_reduce, _describe_all_reduce)


# --- rotate: each tensor goes to the next rank of the group. No operator: ring attention is not compiled.


def rotate(xs: list[Tensor], *, group: dist.ProcessGroup, label: Label) -> Callable[[], list[Tensor]]:
    """Start sending each tensor to the next rank of the group. What is returned waits for those of the previous rank.

    Tensors are contiguous, of equal shapes on all ranks, and must not change before that.
    """
    exchange = exchange_of(group)
    if exchange.agreement is not None:
        exchange.agreement.check(in_words(label, *(f"{list(x.shape)} {x.dtype}" for x in xs)))
    sent, received = list(xs), [torch.empty_like(x) for x in xs]
    after, before = (exchange.rank + 1) % exchange.size, (exchange.rank - 1) % exchange.size
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.irecv, as_bytes(x), group=group, group_peer=before, tag=_ROTATION_TAG) for x in received]
        + [dist.P2POp(dist.isend, as_bytes(x), group=group, group_peer=after, tag=_ROTATION_TAG) for x in sent]
    )
    exchange.count(label, sum(x.nbytes for x in xs))

    def end() -> list[Tensor]:
        for work in works:
            work.wait()
        sent.clear()  # kept until now: on CUDA they go on another stream than the one that frees them
        return received

    return end


# --- Arguments.


def check_switch(members: Members, x: Tensor, gather: int, split: int, size: int) -> tuple[int, int]:
    """Both dims from 0 on. Errors: UsageError, and ValueError where this rank's shard is not the one that ``size`` gives it."""
    whole, sharded = check_dim(x, gather, "gather"), check_dim(x, split, "split")
    if whole == sharded:
        raise UsageError(f"switch: gather and split are both dim {whole}; a switch moves the shard to another dim")
    check_shard(members, x, whole, size, "switch")
    return whole, sharded


def check_dim(x: Tensor, dim: int, name: str) -> int:
    """``dim`` from 0 on. Errors: UsageError."""
    if not -x.dim() <= dim < x.dim():
        raise UsageError(f"{name}={dim} is no dim of a tensor of shape {tuple(x.shape)}; use {-x.dim()}..{x.dim() - 1}")
    return dim % x.dim()


def check_shard(members: Members, x: Tensor, dim: int, size: int, operation: str) -> None:
    """Errors: ValueError where ``x`` does not hold this rank's shard of ``dim``, of global size ``size``."""
    own = _own_size(members, size)
    if x.shape[dim] != own:
        raise ValueError(
            f"{operation}: rank {members.rank} of {members.size} in group {members.description!r} holds {x.shape[dim]} of dim "
            f"{dim} (shape {tuple(x.shape)}), but its shard of size={size} is {own}; size is the global size of "
            "the sharded dim, and shards follow dsp.shard_sizes"
        )


def _own_size(members: Members, size: int) -> int:
    """Of this rank's shard."""
    start, stop = shard_range(size, members.size, members.rank)
    return stop - start


def _whole(x: Tensor, dim: int, size: int) -> tuple[int, ...]:
    """The shape of ``x`` with ``size`` of ``dim``."""
    return (*x.shape[:dim], size, *x.shape[dim + 1 :])
