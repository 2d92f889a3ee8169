"""Takes activations through the blocks of a video transformer, each in the layout that the cheapest plan gives it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_dsp.embedded import ring, ulysses, ulysses_in_chunks
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout
from megatron_dsp.models.attention import Over, OverRanks, SelfAttention
from megatron_dsp.models.embeddings import time_rotations
from megatron_dsp.models.video_dit_config import VideoDiTConfig
from megatron_dsp.planner import Attention, ChainPlan, StageNeeds, cheapest_plan
from megatron_dsp.reshard import WHOLE_ENDS, Activation, Ends, FixedOverlap, Region, Stage, overlap_of, switch
from megatron_dsp.tensor import TensorParallel

DIMS = ("time", "batch", "space", "channels")
BACKENDS = ("dsp", "ulysses", "ring")
_BLOCK_NAMES = {"space": "spatial", "time": "temporal", "all": "full"}


class Activations(NamedTuple):
    """What goes from one part of the model to the next.

    Attributes:
        x: tokens [T, B, S, C], of which a rank holds its shard, in the layout of the part that made it.
        time: the embedding of all frames' diffusion times, [T, B, C].
        modulation: that all blocks share, of all frames, [T, B, 6 C].
        tokens: conditioning tokens, [B, L, C].
        mask: of those to attend to, [B, L], bool.
    """

    x: Tensor
    time: Tensor
    modulation: Tensor
    tokens: Tensor
    mask: Tensor


class BlockRunner(NamedTuple):
    """Runs blocks and the head of a `VideoDiT`, whichever of them are here.

    Attributes:
        config: as that of the blocks.
        tensor: as that of the blocks.
        group: the sequence group; None: this rank has everything.
        backend: as of `VideoDiT.forward`.
        recompute: as of `VideoDiT`.
    """

    config: VideoDiTConfig
    tensor: TensorParallel
    group: ProcessGroup | None
    backend: str
    recompute: bool

    def layouts(self, frames: int, batch: int, space: int) -> tuple[str, ...]:
        """The dim that is sharded before the first part, while each part runs, and in the result: by the cheapest plan.

        The model's input and output have shards of time.
        """
        return _constant_layouts(*self.plan_inputs(frames, batch, space))

    def plan_inputs(self, frames: int, batch: int, space: int) -> PlanInputs:
        """What the plan for activations of these sizes depends on. Errors: UsageError for an unknown backend."""
        if self.backend not in BACKENDS:
            raise UsageError(f"backend={self.backend!r} is not known; use one of: {', '.join(BACKENDS)}")
        return PlanInputs(
            block_dims=tuple(self.config.block_dims),
            heads=self.config.heads // self.tensor.size,
            head_size=self.config.hidden // self.config.heads,
            hidden=self.config.hidden,
            patch_channels=self.config.patch_channels,
            space_is_divided=self.tensor.sequence_dim is not None,
            backend=self.backend,
            ranks=1 if self.group is None else self.group.size(),
            # A compiler's symbols become numbers, on which the plan depends.
            frames=operator.index(frames),
            batch=operator.index(batch),
            space=operator.index(space),
        )

    def run(self, parts: Sequence[nn.Module], activations: Activations, *, space: int, first: int) -> Tensor:
        """Take ``activations.x`` through ``parts``; the result is in the last one's layout, that of the model in its frames.

        ``space`` are the spatial tokens of a frame; ``first`` is the place of the first part among the model's blocks, from 0;
        the head's place is behind them.
        """
        x, time, modulation, tokens, mask = activations
        frames, batch = time.shape[:2]
        # With sequence_dim the tensor ranks divide the tokens first: each group along the sequence axis knows its own alone.
        space = space if self.tensor.sequence_dim is None else space // self.tensor.size
        layouts, block_dims = self.layouts(frames, batch, space), self.config.block_dims
        layout = Layout(DIMS, (frames, batch, space, self.config.hidden), sharded=layouts[first])
        region = Region(layout, self.group, sharing=self.tensor.sharing(self.config.hidden))
        rotations = time_rotations(frames, self.config.hidden // self.config.heads, like=x)
        sides = (self.tensor.beside(modulation), self.tensor.part(tokens), mask, rotations)
        stages = []
        for index, part in enumerate(parts, start=first):
            sharded = layouts[index + 1]
            if index == len(block_dims):
                stages.append(Stage(partial(self._run_head, part, region, time), sharded, "head", has_ends=self._has_ends))
            else:
                over = block_dims[index]
                over_ranks = self._choose_attention(over, sharded, layout)
                compute = partial(self._run_block, part, over, region, sides, over_ranks)
                stages.append(
                    Stage(
                        compute,
                        sharded,
                        _BLOCK_NAMES[over],
                        mixes_sharded=over_ranks is not None,
                        number=index // 2,
                        has_ends=self._has_ends,
                        recomputes=self.recompute,
                    )
                )
        x = region.run(stages, x, independent="batch")
        at_head, at_end = layouts[-2:]
        if first + len(parts) > len(block_dims) and at_head != at_end:
            # Patches are narrower than tokens, and all tensor ranks have all of them.
            gather, split = DIMS.index(at_head), DIMS.index(at_end)
            x = switch(x, gather=gather, split=split, size=layout.sizes[gather], group=self.group, stage="output")
        return x

    @property
    def _has_ends(self) -> bool:
        """Whether what treats tokens alone gives as many as it gets: not where tensor ranks have shards of them."""
        return self.tensor.sequence_dim is None

    def _choose_attention(self, over: Over, sharded: str, layout: Layout) -> OverRanks | None:
        """What attends over ``over`` where ``sharded`` is a part of it that is sharded; None: the block has all of it."""
        if self.group is None or self.group.size() == 1 or over not in (sharded, "all"):
            return None
        return attention_over_ranks(self.backend, over, sharded, layout, self.group)

    def _run_block(
        self,
        block: nn.Module,
        over: Over,
        region: Region,
        sides: tuple[Tensor, Tensor, Tensor, Tensor],
        over_ranks: OverRanks | None,
        x: Activation,
        ends: Ends = WHOLE_ENDS,
    ) -> Activation:
        modulation, tokens, mask, rotations = sides
        local = [
            _local_part(region, modulation, "time", "batch"),
            _local_part(region, tokens, "batch"),
            _local_part(region, mask, "batch"),
        ]
        if over != "space":
            local.append(_local_part(region, rotations, "time"))
        if self.recompute and torch.is_grad_enabled():
            # Blocks draw no random numbers, whose state would be saved and restored.
            more: dict[str, Any] = {"over_ranks": over_ranks, "ends": ends, "use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(block, x, *local, **more)
        return block(x, *local, over_ranks=over_ranks, ends=ends)

    def _run_head(self, head: nn.Module, region: Region, time: Tensor, x: Activation, ends: Ends = WHOLE_ENDS) -> Activation:
        time = _local_part(region, time, "time", "batch")

        def enter(x: Tensor) -> tuple[Tensor]:
            of_frames = ends.local(ends.local(time, dim=0, name="time"), dim=1, name="batch")
            return (head(self.tensor.whole(x), of_frames),)

        return ends.leave(lambda patches: patches, *ends.enter(enter, x))


def _local_part(region: Region, side: Tensor, *names: str) -> Tensor:
    for dim, name in enumerate(names):
        side = region.local(side, dim=dim, name=name)
    return side


class PlanInputs(NamedTuple):
    """All that the plan of a model's blocks depends on: plain numbers and names, which compilers take for constants.

    Attributes:
        block_dims: as of the config.
        heads: attention heads of a rank.
        head_size: channels of one.
        hidden: channels of a token.
        patch_channels: values of a patch.
        space_is_divided: whether tensor ranks divide space before the sequence group does.
        backend: as of `VideoDiT.forward`.
        ranks: of the sequence group.
        frames, batch, space: sizes of the activation.
    """

    block_dims: tuple[Over, ...]
    heads: int
    head_size: int
    hidden: int
    patch_channels: int
    space_is_divided: bool
    backend: str
    ranks: int
    frames: int
    batch: int
    space: int


@torch.compiler.assume_constant_result  # a compiler would trace the planner; it is a function of its arguments alone
def _constant_layouts(*inputs: Any) -> tuple[str, ...]:
    # The fields of PlanInputs one by one: an object that was made under the compiler is not there yet.
    plan = plan_blocks(PlanInputs(*inputs), element_size=1)
    return tuple(cast(str, layout) for layout in ("time", *plan.layouts, plan.after.target))


@lru_cache(maxsize=256)
def plan_blocks(inputs: PlanInputs, element_size: int) -> ChainPlan:
    """The cheapest plan of the blocks and the head. Its layouts are the same for all bytes that an element has."""
    attention = Attention(inputs.heads, inputs.head_size * element_size, ring=inputs.backend == "ring")
    mixed = {"space": ("space",), "time": ("time",), "all": ("time", "space")}
    stages = [
        # DSP keeps the shard on a dim that a block does not mix, where there is one. With Ulysses and Ring it never moves.
        StageNeeds(
            f"{_BLOCK_NAMES[over]} {index // 2}", mixed[over], attention if inputs.backend != "dsp" or over == "all" else None
        )
        for index, over in enumerate(inputs.block_dims)
    ]
    token_bytes, patch_bytes = inputs.hidden * element_size, inputs.patch_channels * element_size
    return cheapest_plan(
        [*stages, StageNeeds("head", ("space",) if inputs.space_is_divided else ())],
        {"time": inputs.frames, "batch": inputs.batch, "space": inputs.space},
        ranks=inputs.ranks,
        shardable=("time", "space") if inputs.backend == "dsp" else ("time",),
        bytes_per_position=[token_bytes] * (len(stages) + 1) + [patch_bytes],
        start="time",
        end="time",
    )


def attention_over_ranks(backend: str, over: Over, sharded: str, layout: Layout, group: ProcessGroup) -> OverRanks:
    """What attends over ``over`` where its dim ``sharded`` is sharded.

    Over all tokens Ring works as over time; the other backends move the shard to the heads.
    """
    overlap = overlap_of(group)
    # Which number of chunks is fastest is measured for DSP's stages alone.
    chunks = overlap.chunks if isinstance(overlap, FixedOverlap) and over != "all" else 1

    dim, stage = DIMS.index(sharded), _BLOCK_NAMES[over]
    arguments: Any = {"over": dim, "heads": 3, "size": layout.sizes[dim], "group": group, "stage": stage}

    def by_ulysses(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        return module.finish(ulysses(module.attend, *module.project(x, rotations), **arguments))

    def by_ulysses_in_chunks(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        project = partial(module.project, rotations=rotations)
        return ulysses_in_chunks(project, module.attend, module.finish, x, along=2, chunks=chunks, **arguments)

    def by_ring(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        query, key, value = module.project(x, rotations)
        batches = (module.to_batch(each) for each in (query, key, value))
        size = layout.size("time") * (layout.size("space") if over == "all" else 1)
        return module.finish(module.to_storage_order(ring(*batches, size=size, group=group, stage=stage), query))

    if backend == "ring":
        return by_ring
    return by_ulysses if chunks == 1 else by_ulysses_in_chunks
