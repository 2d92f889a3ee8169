"""Ulysses (Jacobs et al., arXiv 2309.14509): attention over a sharded dim, whose shard goes to the heads meanwhile.

Heads are one more dim that attention does not mix. So this is a switch there and one back, with the exact adjoints of a switch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import switch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    stage: str = "",
) -> Tensor:
    """Attention over dim ``over``, of global size ``size``, of which each rank holds its shard; the result is sharded alike.

    ``query``, ``key`` and ``value`` go to whole dims ``over`` and sharded ``heads`` in one collective; ``attend(query, key,
    value)`` runs there; its result comes back in a second one. Tensors have both dims in the same places, [T, B, S, H, D] with
    ``over=0, heads=3`` for example, and ``attend`` returns the shape of its query. Any number of heads does: with fewer
    than ranks, some ranks attend with none. Keys and values may have fewer heads than queries (grouped-query attention,
    arXiv 2305.13245): then the groups are sharded, and ``attend`` gets all queries of its groups.

    Errors: UsageError where the number of query heads is not a multiple of that of key heads; otherwise as `switch`.
    """
    heads %= query.dim()
    over %= query.dim()
    groups, together = key.shape[heads], query.shape[heads]
    if together % groups:
        raise UsageError(f"ulysses: {together} query heads over {groups} key heads; the first must be a multiple of the second")
    if over > heads:
        raise UsageError(f"ulysses: over={over} must come before heads={heads}; transpose the tensors")
    # A group's queries stay together: [..., H, D] becomes [..., groups, H / groups, D], and the groups are sharded.
    query = query.unflatten(heads, (groups, together // groups))
    query, key, value = switch((query, key, value), gather=over, split=heads, size=size, group=group, stage=stage)
    attended = attend(query.flatten(heads, heads + 1), key, value)
    attended = attended.unflatten(heads, (key.shape[heads], together // groups))
    back = switch(attended, gather=heads, split=over, size=groups, group=group, stage=stage)
    return back.flatten(heads, heads + 1)
