"""A model's own calls of `scaled_dot_product_attention` over a dim that is sharded: they attend to all ranks' tokens.

Heads are a dim that attention does not mix. So queries, keys and values are switched to heads in one collective, and the result
back (Ulysses, arXiv 2309.14509), or keys and values go round the ranks (Ring, arXiv 2310.01889) where that sends less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from megatron_dsp.embedded import ring
from megatron_dsp.errors import RankError
from megatron_dsp.layout import shard_range
from megatron_dsp.parallelize.layout_changes import LayoutChange, change_layouts
from megatron_dsp.parallelize.module_needs import HEADS
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.sharded_forward import ShardedForward
from megatron_dsp.planner import Attention, StageNeeds, cheapest_plan

_PER_GROUP = "queries of a group"  # a dim of queries next to HEADS, which are then those of keys and values


class AttentionCallsOverRanks(TorchFunctionMode):
    """While it is entered, attention of queries of the pattern ``text`` runs over dim ``sharded`` on all ranks of ``forward``.

    ``calls`` counts the calls of `scaled_dot_product_attention`.
    """

    def __init__(self, forward: ShardedForward, name: str, text: str, sharded: str):
        super().__init__()
        self._forward, self._name, self._sharded = forward, name, sharded
        self._where = f"module {name!r}: scaled_dot_product_attention"
        pattern = parse(text)
        self._over_ranks = sharded in pattern.names and pattern.dim_of(sharded) == len(pattern.dims) - 2
        self._pattern = pattern.with_dim_after(HEADS, _PER_GROUP)
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs or {})
        self.calls += 1
        attend = self._attend if self._over_ranks else func
        return attend(*args, **kwargs or {})

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        group, stage = self._forward.group, self._name
        with self._forward.agree_on_errors():
            changes, tokens = self._changes_to_heads(query, key, value)
            self._check_mask(attn_mask, tokens)
        queries, heads = changes["query"], changes["query"].sizes[HEADS]
        # What Ring does not know of: masks, dropout, causality, scales, and tokens beside the sharded ones.
        plain = attn_mask is None and not any((*args, *kwargs.values())) and not self._pattern.sums
        alike = query.shape == key.shape == value.shape and query.dim() == 4 and query.device.type == "cpu"
        if plain and alike and self._ring_is_cheapest(heads, query):
            return ring(query, key, value, size=tokens, group=group, stage=stage)
        whole = change_layouts(changes, group, stage)
        start, stop = shard_range(heads, group.size(), group.rank())
        if attn_mask is not None:
            attn_mask = self._mask_of_heads(attn_mask, heads, queries.sizes[_PER_GROUP], start, stop)
        attended = scaled_dot_product_attention(whole["query"], whole["key"], whole["value"], attn_mask, *args, **kwargs)
        sizes = {**queries.sizes, **self._forward.sizes, HEADS: stop - start}
        back = LayoutChange(attended, self._pattern, sizes, HEADS, self._sharded, heads)
        return change_layouts({"output": back}, group, stage)["output"]

    def _changes_to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, LayoutChange], int]:
        """The three on their way to the heads, those of keys, and the global number of tokens."""
        if not query.shape[-2] == key.shape[-2] == value.shape[-2]:
            raise RankError(
                f"{self._where} has {query.shape[-2]} queries, {key.shape[-2]} keys and {value.shape[-2]} values on this rank; "
                "attention= is for self-attention over the sharded dim, where they are equally many"
            )
        known, changes = {**self._forward.local_sizes(self._sharded), _PER_GROUP: 1}, {}
        for name, x in (("key", key), ("value", value), ("query", query)):
            if name == "query":
                del known[_PER_GROUP]
            sizes = self._forward.fit(f"{self._where}: its {name} should be a shard", x, self._pattern, known)
            changes[name] = LayoutChange(x, self._pattern, sizes, self._sharded, HEADS, self._forward.sizes[self._sharded])
            known[HEADS] = sizes[HEADS]
        return changes, self._pattern.shape({**sizes, self._sharded: self._forward.sizes[self._sharded]})[-2]

    def _check_mask(self, mask: Tensor | None, tokens: int) -> None:
        if mask is not None and (mask.dim() < 2 or any(size not in (1, tokens) for size in mask.shape[-2:])):
            raise RankError(
                f"{self._where}: attn_mask of shape {tuple(mask.shape)} must be that of all {tokens} tokens, or 1, in its last "
                "two dims; pass masks whole, not as Slice"
            )

    def _mask_of_heads(self, mask: Tensor, heads: int, per_group: int, start: int, stop: int) -> Tensor:
        dim = self._pattern.dim_of(HEADS) - len(self._pattern.dims)
        if mask.dim() < -dim or mask.shape[dim] == 1:
            return mask
        return mask.unflatten(dim, (-1, heads, per_group)).narrow(dim - 1, start, stop - start).flatten(dim - 2, dim)

    def _ring_is_cheapest(self, heads: int, query: Tensor) -> bool:
        attention = Attention(heads, query.shape[-1] * query.element_size(), ring=True)
        plan = cheapest_plan(
            [StageNeeds(self._name, (self._sharded,), attention)],
            self._forward.sizes,
            ranks=self._forward.group.size(),
            shardable=(self._sharded,),
            bytes_per_position=1,
            start=self._sharded,
            end=self._sharded,
        )
        return plan.stages[0].served == "ring"
