"""Ulysses (Jacobs et al., arXiv 2309.14509): attention over a sharded dim, whose shard goes to the heads meanwhile.

Heads are one more dim that attention does not mix. So this is a switch there and one back, with the exact adjoints of a switch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_ranges
from megatron_dsp.reshard import switch
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import StageName
from megatron_dsp.reshard.stages.legs import Landing, Leg, begin, end
from megatron_dsp.reshard.stages.schedule import chunk_sizes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def ulysses(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    over: int,
    heads: int,
    size: int,
    group: dist.ProcessGroup | None = None,
    stage: str | StageName = "",
) -> Tensor:
    """Attention over dim ``over``, of global size ``size``, of which each rank holds its shard; the result is sharded alike.

    ``query``, ``key`` and ``value`` go to whole dims ``over`` and sharded ``heads`` in one collective; ``attend(query, key,
    value)`` runs there; its result comes back in a second one. Tensors have both dims in the same places, [T, B, S, H, D] with
    ``over=0, heads=3`` for example, and ``attend`` returns the shape of its query. Any number of heads does: with fewer
    than ranks, some ranks attend with none. Keys and values may have fewer heads than queries (grouped-query attention,
    arXiv 2305.13245): then the groups are sharded, and ``attend`` gets all queries of its groups.

    Errors: UsageError where the number of query heads is not a multiple of that of key heads; otherwise as `switch`.
    """
    over, heads = _dims(query, over, heads)
    query = _by_groups(query, key, heads)
    groups, together = query.shape[heads : heads + 2]
    query, key, value = switch((query, key, value), gather=over, split=heads, size=size, group=group, stage=stage)
    attended = attend(query.flatten(heads, heads + 1), key, value)
    attended = attended.unflatten(heads, (key.shape[heads], together))
    back = switch(attended, gather=heads, split=over, size=groups, group=group, stage=stage)
    return back.flatten(heads, heads + 1)


def ulysses_in_chunks(
    project: Project,
    attend: Attend,
    finish: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    along: int,
    chunks: int,
    over: int,
    heads: int,
    size: int,
    group: dist.ProcessGroup | None = None,
    stage: str | StageName = "",
) -> Tensor:
    """``finish(attention of project(x))`` in ``chunks`` chunks of ``x`` along dim ``along``, which none of the three mixes.

    While a chunk's queries, keys and values travel, the next one is projected; while its result travels back, the next one is
    attended to. ``project`` gives query, key and value; the other arguments are those of `ulysses`. Forward and backward.
    """
    group = mesh.sequence_group(group)
    exchange = exchange_of(group)
    stage = StageName(stage) if isinstance(stage, str) else stage
    over_ranges = shard_ranges(size, exchange.size)
    there: list[tuple[Leg, Tensor]] = []
    back: list[tuple[Leg, Tensor]] = []
    for part in x.split(chunk_sizes(x.shape[along], max(1, min(chunks, x.shape[along]))), along):
        query, key, value = project(part)
        over, heads = _dims(query, over, heads)
        query = _by_groups(query, key, heads)
        groups, together = query.shape[heads : heads + 2]
        head_ranges = shard_ranges(groups, exchange.size)
        joined = torch.cat([query, key.unsqueeze(heads + 1), value.unsqueeze(heads + 1)], heads + 1)
        leg = Leg(exchange, over, heads, size, over_ranges, head_ranges, Landing(), Landing(), stage)
        there.append((leg, begin([leg], joined)[0]))
    for leg, token in there:
        query, key, value = end([leg], [token]).split([together, 1, 1], heads + 1)
        attended = attend(query.flatten(heads, heads + 1), key.squeeze(heads + 1), value.squeeze(heads + 1))
        attended = attended.unflatten(heads, (query.shape[heads], together))
        leg = Leg(exchange, heads, over, groups, head_ranges, over_ranges, Landing(), Landing(), stage)
        back.append((leg, begin([leg], attended)[0]))
    return torch.cat([finish(end([leg], [token]).flatten(heads, heads + 1)) for leg, token in back], along)


def _dims(query: Tensor, over: int, heads: int) -> tuple[int, int]:
    over, heads = over % query.dim(), heads % query.dim()
    if over > heads:
        raise UsageError(f"ulysses: over={over} must come before heads={heads}; transpose the tensors")
    return over, heads


def _by_groups(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The queries of a group stay together: [..., H, D] becomes [..., groups, H / groups, D], and the groups are sharded."""
    groups, together = key.shape[heads], query.shape[heads]
    if together % groups:
        raise UsageError(f"ulysses: {together} query heads over {groups} key heads; the first must be a multiple of the second")
    return query.unflatten(heads, (groups, together // groups))
