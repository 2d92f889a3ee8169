"""ST-DiT: a factorised video diffusion transformer, after STDiT3 of Open-Sora (https://github.com/hpcaitech/Open-Sora).

A layer pair is one block that attends over space and one that attends over time. Activations stay in storage order
[T, B, S, C] from the first layer to the last: T token frames, B batch, S spatial tokens, C hidden size. The modules
compute on whatever part of T or S they are given and know nothing of ranks; ``VideoDiT.forward`` alone says where the
shard lies.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_dsp.embedded import ring, ulysses, ulysses_in_chunks
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.models.attention import CrossAttention, Over, OverRanks, SelfAttention
from megatron_dsp.models.embeddings import (
    ConditioningEmbedding,
    TimestepEmbedding,
    grid_size,
    patchify,
    space_positions,
    time_rotations,
    unpatchify,
)
from megatron_dsp.models.norms import layer_norm
from megatron_dsp.planner import Attention, ChainPlan, StageNeeds, cheapest_plan
from megatron_dsp.reshard import FixedOverlap, Region, Stage, switch
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel, initialise

DIMS = ("time", "batch", "space", "channels")
BACKENDS = ("dsp", "ulysses", "ring")


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a :class:`VideoDiT`.

    Attributes:
        layers: layer pairs; each is one spatial and one temporal block.
        hidden: channels of a token; a multiple of 4 (sine and cosine of two space positions).
        heads: attention heads; ``hidden / heads`` must be even (rotary positions turn pairs of channels).
        patch: frames, rows and columns of a token.
        channels: channels of the video (pixels or latents).
        conditioning_size: channels of a conditioning token.
        mlp_ratio: width of the MLPs over ``hidden``.
        qk_norm: normalise the queries and keys of self-attention.
        full_attention_every: of every so many layer pairs, the last one's temporal block attends over all tokens of all frames;
            None: none does.
    """

    layers: int
    hidden: int
    heads: int
    conditioning_size: int
    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 3
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    full_attention_every: int | None = None

    @property
    def patch_channels(self) -> int:
        """Values of a token before it is embedded."""
        return self.channels * math.prod(self.patch)

    @property
    def block_dims(self) -> list[Over]:
        """What each block attends over, in the order in which they run."""
        every = self.full_attention_every
        pairs: list[tuple[Over, Over]] = [
            ("space", "all" if every is not None and pair % every == 0 else "time") for pair in range(1, self.layers + 1)
        ]
        return [over for pair in pairs for over in pair]

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "conditioning_size", "channels", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)} must be greater than 0")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise UsageError(f"patch={self.patch} must be three sizes of at least 1: frames, rows, columns")
        if self.hidden % 4:
            raise UsageError(f"hidden={self.hidden} must be a multiple of 4, for sinusoidal positions in space")
        if self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} over heads={self.heads} must give an even head size, for rotary positions: "
                f"choose hidden as a multiple of {2 * self.heads}"
            )
        if self.full_attention_every is not None and self.full_attention_every < 1:
            raise UsageError(f"full_attention_every={self.full_attention_every} must be at least 1, or None")


# 720m and 3b have as many parameters as the models that the DSP paper trains (arXiv 2403.10266), for T5-XXL's text tokens
# of 4096 channels and latents of 4. A layer pair here has two cross-attentions and two MLPs, 32 C^2 parameters; the depths
# follow from that.
PRESETS: dict[str, VideoDiTConfig] = {
    "tiny": VideoDiTConfig(layers=3, hidden=96, heads=4, conditioning_size=32, patch=(1, 4, 4)),
    "720m": VideoDiTConfig(layers=17, hidden=1152, heads=16, conditioning_size=4096, channels=4),
    "3b": VideoDiTConfig(layers=22, hidden=2048, heads=32, conditioning_size=4096, channels=4),
}


class Block(nn.Module):
    """Self-attention over one dim, cross-attention to the conditioning, MLP; the first and the last modulated.

    The modulation (shift, scale and gate, twice) is the sum of one that all blocks share, computed from the diffusion
    time, and the block's own table ("adaLN-single", PixArt-alpha, arXiv 2310.00426).
    """

    def __init__(self, config: VideoDiTConfig, over: Over, tensor: TensorParallel) -> None:
        super().__init__()
        if over == "all" and tensor.sequence_dim is not None:
            raise UsageError(
                "full_attention_every with --sequence-parallel: the tensor ranks have shards of what full attention attends "
                "over; use one of the two"
            )
        inner = int(config.hidden * config.mlp_ratio)
        self.over, self.tensor = over, tensor
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden))
        self.self_attention = SelfAttention(config.hidden, config.heads, over, config.qk_norm, tensor)
        self.cross_attention = CrossAttention(config.hidden, config.heads, tensor)
        self.mlp = nn.Sequential(
            tensor.column(config.hidden, inner), nn.GELU(approximate="tanh"), tensor.row(inner, config.hidden)
        )

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        tokens: Tensor,
        mask: Tensor,
        rotations: Tensor | None = None,
        over_ranks: OverRanks | None = None,
    ) -> Tensor:
        """Run the block on x [T, B, S, C], all of the dim that it attends over and any part of the other.

        Args:
            x: [T, B, S, C].
            modulation: [T, B, 6 C], of the same frames.
            tokens: conditioning tokens, [B, L, C].
            mask: [B, L], bool, True = attend, at least one a sample.
            rotations: rotary positions of the frames, [T, 1, 1, 1, head size / 2], complex; not for attention over space.
            over_ranks: attention where x has a shard of a dim that the block attends over.
        """
        table = self.tensor.beside(self.modulation_table) + modulation.unflatten(-1, self.modulation_table.shape)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unsqueeze(2).unbind(3)  # each [T, B, 1, C]
        x = torch.addcmul(x, gate, self.self_attention(modulated_norm(x, shift, scale), rotations, over_ranks))
        x = x + self.cross_attention(x, tokens, mask)
        return torch.addcmul(x, mlp_gate, self.mlp(self.tensor.enter(modulated_norm(x, mlp_shift, mlp_scale))))

    def reset_parameters(self) -> None:
        """Begin as the identity where the modulation is 0 (adaLN-zero, arXiv 2212.09748)."""
        _reset_linear_and_norms(self)
        nn.init.zeros_(self.modulation_table)
        initialise(cast(Tensor, self.cross_attention.out.weight), nn.init.zeros_)


class Head(nn.Module):
    """From tokens to flattened patches: a modulated norm and a linear layer."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.modulation_table = nn.Parameter(torch.empty(2, config.hidden))
        self.out = nn.Linear(config.hidden, config.patch_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [T, B, S, C] and the embedding of its frames' times [T, B, C] -> patches [T, B, S, patch channels]."""
        shift, scale = (self.modulation_table + time[:, :, None]).unsqueeze(2).unbind(3)
        return self.out(modulated_norm(x, shift, scale))

    def reset_parameters(self) -> None:
        """Give 0."""
        _reset_linear_and_norms(self)
        nn.init.zeros_(self.modulation_table)
        nn.init.zeros_(self.out.weight)


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


class Embedding(nn.Module):
    """From a video, its diffusion times and its conditioning to what the blocks take."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.patch_embedding = nn.Linear(config.patch_channels, config.hidden)
        self.timestep_embedding = TimestepEmbedding(config.hidden)
        self.conditioning_embedding = ConditioningEmbedding(config.conditioning_size, config.hidden)
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)

    def forward(self, video: Tensor, timesteps: Tensor, conditioning: Tensor, mask: Tensor, drop: Tensor | None) -> Activations:
        """Embed this rank's frames of a video, and all of the others; arguments as those of `VideoDiT.forward`."""
        x = self.patch_embedding(patchify(video.to(self.patch_embedding.weight.dtype), self.patch))
        h, w = grid_size(video.shape[3], video.shape[4], self.patch)
        time = self.timestep_embedding(timesteps)
        tokens, mask = self.conditioning_embedding(conditioning, mask, drop)
        return Activations(x + space_positions(h, w, like=x), time, self.modulation(F.silu(time)), tokens, mask)

    def reset_parameters(self) -> None:
        """No modulation."""
        _reset_linear_and_norms(self)
        nn.init.normal_(self.conditioning_embedding.null_token, std=0.02)
        nn.init.zeros_(self.modulation.weight)


class VideoDiT(nn.Module):
    """Predicts the velocity of a noisy video from diffusion times and conditioning tokens.

    Args:
        config: its sizes.
        tensor: how blocks are spread over the tensor group; ``sequence_dim`` must be 2, space, if given.
        recompute: whether blocks are computed again in backward instead of keeping what they computed.
    """

    def __init__(self, config: VideoDiTConfig, *, tensor: TensorParallel | None = None, recompute: bool = False) -> None:
        super().__init__()
        seeds = part_seeds(config)
        self.config, self.recompute = config, recompute
        self.tensor = TensorParallel() if tensor is None else tensor
        self.embedding = Embedding(config)
        self.spatial_blocks = nn.ModuleList(Block(config, over, self.tensor) for over in config.block_dims[::2])
        self.temporal_blocks = nn.ModuleList(Block(config, over, self.tensor) for over in config.block_dims[1::2])
        self.head = Head(config)
        for part, seed in zip(self.parts(), seeds, strict=True):
            reset_part(part, seed)

    def reset_parameters(self) -> None:
        """Initialise all parameters: blocks begin as the identity, the output as 0 (adaLN-zero, arXiv 2212.09748)."""
        for part, seed in zip(self.parts(), part_seeds(self.config), strict=True):
            reset_part(part, seed)

    def blocks(self) -> list[Block]:
        """The blocks in the order in which they run."""
        pairs = zip(self.spatial_blocks, self.temporal_blocks, strict=True)
        return [cast(Block, block) for pair in pairs for block in pair]

    def parts(self) -> list[Embedding | Block | Head]:
        """What the model consists of, in the order in which it runs."""
        return [self.embedding, *self.blocks(), self.head]

    def forward(
        self,
        video: Tensor,
        timesteps: Tensor,
        conditioning: Tensor,
        conditioning_mask: Tensor,
        conditioning_drop: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
        backend: str = "dsp",
    ) -> Tensor:
        """Predict the velocity of this rank's frames; with no group, of all frames.

        Args:
            video: this rank's frames, [frames, B, channels, height, width]: those of its token frames by the rule of
                ``torch.tensor_split``, so only the last frames of the clip may leave a patch unfilled.
            timesteps: diffusion time in [0, 1] of every token frame of the whole clip, [T, B]; 0 for clean frames.
            conditioning: conditioning tokens, [B, L, D].
            conditioning_mask: [B, L], bool, True = attend to the token.
            conditioning_drop: [B], bool; where True, the tokens are replaced by the learned null token, as they are
                where the mask leaves none (classifier-free guidance).
            group: the sequence group. Arguments other than ``video`` are equal on all its ranks.
            backend: how temporal attention gets all frames: "dsp" moves the shard to space before it, "ulysses" and "ring"
                attend over the sharded time.

        Returns:
            Shaped like ``video``, in the parameters' dtype.

        Raises:
            UsageError: if shapes or dtypes do not fit each other or the config.
            ValueError: if ``video`` does not hold the frames that belong to this rank.
        """
        check_inputs(self.config, group, video, timesteps, conditioning, conditioning_mask, conditioning_drop)
        x, *others = self.embedding(video, timesteps, conditioning, conditioning_mask, conditioning_drop)
        entering = Activations(self.tensor.shard(x), *others)
        h, w = grid_size(video.shape[3], video.shape[4], self.config.patch)
        way = Way(self.config, self.tensor, group, backend, self.recompute)
        patches = way.run([*self.blocks(), self.head], entering, space=h * w, first=0)
        return unpatchify(patches, self.config.patch, video.shape)


class Way(NamedTuple):
    """How activations go through blocks.

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
        return _layouts(*self._of_plan(frames, batch, space))

    def _of_plan(self, frames: int, batch: int, space: int) -> tuple[Any, ...]:
        if self.backend not in BACKENDS:
            raise UsageError(f"backend={self.backend!r} is not known; use one of: {', '.join(BACKENDS)}")
        ranks = 1 if self.group is None else self.group.size()
        head_moves = self.tensor.sequence_dim is None  # else tensor ranks divide space before the others do
        heads = self.config.heads // self.tensor.size, self.config.hidden // self.config.heads
        widths = self.config.hidden, self.config.patch_channels
        sizes = map(operator.index, (frames, batch, space))  # a compiler's symbols become numbers, on which the plan depends
        return (tuple(self.config.block_dims), heads, widths, head_moves, self.backend, ranks, *sizes)

    def run(self, parts: Sequence[Block | Head], activations: Activations, *, space: int, first: int) -> Tensor:
        """Take ``activations.x`` through ``parts``; the result is in the last one's layout, that of the model in its frames.

        ``space`` are the spatial tokens of a frame; ``first`` is the place of the first part among the model's blocks, from 0.
        """
        x, time, modulation, tokens, mask = activations
        frames, batch = time.shape[:2]
        # With sequence_dim the tensor ranks divide the tokens first: each group along the sequence axis knows its own alone.
        space = space if self.tensor.sequence_dim is None else space // self.tensor.size
        layouts = self.layouts(frames, batch, space)
        layout = Layout(DIMS, (frames, batch, space, self.config.hidden), sharded=layouts[first])
        region = Region(layout, self.group, sharing=self.tensor.sharing(self.config.hidden))
        rotations = time_rotations(frames, self.config.hidden // self.config.heads, like=x)
        sides = (self.tensor.beside(modulation), self.tensor.part(tokens), mask, rotations)
        stages = []
        for index, part in enumerate(parts, start=first):
            sharded = layouts[index + 1]
            if isinstance(part, Head):
                stages.append(Stage(partial(self._head, part, region, time), sharded, "head"))
            else:
                over_ranks = self._over_ranks(part.over, sharded, region)
                name = f"{_NAMES[part.over]} {index // 2}"
                compute = partial(self._block, part, region, sides, over_ranks)
                stages.append(Stage(compute, sharded, name, mixes_sharded=over_ranks is not None))
        x = region.run(stages, x, independent="batch")
        if parts and isinstance(parts[-1], Head) and layouts[-1] != region.layout.sharded:
            # Patches are narrower than tokens, and all tensor ranks have all of them.
            gather, split = DIMS.index(region.layout.sharded or ""), DIMS.index(layouts[-1])
            x = switch(x, gather=gather, split=split, size=layout.sizes[gather], group=self.group, stage="output")
        return x

    def _over_ranks(self, over: Over, sharded: str, region: Region) -> OverRanks | None:
        """What attends over ``over`` where ``sharded`` is a part of it that is sharded; None: the block has all of it."""
        if self.group is None or self.group.size() == 1 or over not in (sharded, "all"):
            return None
        return attention_over_ranks(self.backend, over, sharded, region.layout, self.group)

    def _block(
        self,
        block: Block,
        region: Region,
        sides: tuple[Tensor, Tensor, Tensor, Tensor],
        over_ranks: OverRanks | None,
        x: Tensor,
    ) -> Tensor:
        modulation, tokens, mask, rotations = sides
        local = [_local(region, modulation, "time", "batch"), _local(region, tokens, "batch"), _local(region, mask, "batch")]
        if block.over != "space":
            local.append(_local(region, rotations, "time"))
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, *local, over_ranks=over_ranks, use_reentrant=False)
        return block(x, *local, over_ranks=over_ranks)

    def _head(self, head: Head, region: Region, time: Tensor, x: Tensor) -> Tensor:
        return head(self.tensor.whole(x), _local(region, time, "time", "batch"))


_NAMES = {"space": "spatial", "time": "temporal", "all": "full"}


@torch.compiler.assume_constant_result  # a compiler would trace the planner; it is a function of its arguments alone
def _layouts(*of_plan: Any) -> tuple[str, ...]:
    plan = _plan(*of_plan, 1)
    return tuple(cast(str, layout) for layout in ("time", *plan.layouts, plan.after.target))


@lru_cache(maxsize=256)
def _plan(
    block_dims: tuple[Over, ...],
    heads: tuple[int, int],
    widths: tuple[int, int],
    head_moves: bool,
    backend: str,
    ranks: int,
    frames: int,
    batch: int,
    space: int,
    element_size: int,
) -> ChainPlan:
    """That of `Way.layouts`, of plain numbers, which compilers take for constants.

    ``heads``: how many a rank has, and their size; ``widths``: channels of a token, and values of a patch; ``head_moves``:
    whether the model's head may run on any shard.
    """
    attention = Attention(heads[0], heads[1] * element_size, ring=backend == "ring")
    mixed = {"space": ("space",), "time": ("time",), "all": ("time", "space")}
    stages = [
        # DSP keeps the shard on a dim that a block does not mix, where there is one. With Ulysses and Ring it never moves.
        StageNeeds(f"{_NAMES[over]} {index // 2}", mixed[over], attention if backend != "dsp" or over == "all" else None)
        for index, over in enumerate(block_dims)
    ]
    return cheapest_plan(
        [*stages, StageNeeds("head", () if head_moves else ("space",))],
        {"time": frames, "batch": batch, "space": space},
        ranks=ranks,
        shardable=("time", "space") if backend == "dsp" else ("time",),
        bytes_per_position=[widths[0] * element_size] * (len(stages) + 1) + [widths[1] * element_size],
        start="time",
        end="time",
    )


def _local(region: Region, side: Tensor, *names: str) -> Tensor:
    for dim, name in enumerate(names):
        side = region.local(side, dim=dim, name=name)
    return side


def part_seeds(config: VideoDiTConfig) -> list[int]:
    """A seed for each part of a model, from torch's generator: a rank that has only some parts gives them the same weights."""
    return torch.randint(2**62, (2 * config.layers + 2,), device="cpu").tolist()


def part_names(config: VideoDiTConfig) -> list[str]:
    """The names of the parts in a `VideoDiT`, in the order in which they run."""
    pairs = ((f"spatial_blocks.{index}", f"temporal_blocks.{index}") for index in range(config.layers))
    return ["embedding", *(name for pair in pairs for name in pair), "head"]


def reset_part(part: Embedding | Block | Head, seed: int) -> None:
    """Initialise a part's parameters from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        part.reset_parameters()


def _reset_linear_and_norms(part: nn.Module) -> None:
    for module in part.modules():
        if isinstance(module, (nn.Linear, ColumnParallelLinear, RowParallelLinear)):
            initialise(module.weight, nn.init.xavier_uniform_)
            if module.bias is not None:
                initialise(module.bias, nn.init.zeros_)
        elif isinstance(module, nn.RMSNorm):
            module.reset_parameters()


def check_inputs(
    config: VideoDiTConfig,
    group: ProcessGroup | None,
    video: Tensor,
    timesteps: Tensor,
    conditioning: Tensor,
    mask: Tensor,
    drop: Tensor | None,
) -> None:
    """Refuse arguments of `VideoDiT.forward` that do not fit the config or each other, with its errors."""
    if video.ndim != 5 or video.shape[2] != config.channels:
        raise UsageError(
            f"video has shape {tuple(video.shape)}; it must be [frames, batch, {config.channels} channels, "
            "height, width], with the channels of the config"
        )
    batch = video.shape[1]
    if timesteps.ndim != 2 or timesteps.shape[1] != batch:
        raise UsageError(
            f"timesteps have shape {tuple(timesteps.shape)}; they must be "
            f"[token frames of the whole clip, {batch}] for this batch"
        )
    size = config.conditioning_size
    if conditioning.ndim != 3 or conditioning.shape[::2] != (batch, size) or conditioning.shape[1] == 0:
        raise UsageError(
            f"conditioning has shape {tuple(conditioning.shape)}; it must be [{batch}, tokens, {size}] with at "
            "least one token: for samples without any, pass one and mask it"
        )
    for name, tensor, shape in (("mask", mask, conditioning.shape[:2]), ("drop", drop, conditioning.shape[:1])):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bool):
            raise UsageError(
                f"conditioning_{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be bool of shape {tuple(shape)}"
            )
    frames, token_frames, depth = video.shape[0], timesteps.shape[0], config.patch[0]
    start, stop = (0, token_frames) if group is None else shard_range(token_frames, group.size(), group.rank())
    most = (stop - start) * depth
    least = most - depth + 1 if start < stop == token_frames else most
    if not least <= frames <= most:
        raise ValueError(
            f"video has {frames} frames, but {stop - start} of the clip's {token_frames} token frames (of {depth} "
            f"frames each) belong here: give it {least} to {most} frames, or timesteps for other token frames"
        )


def attention_over_ranks(backend: str, over: Over, sharded: str, layout: Layout, group: ProcessGroup) -> OverRanks:
    """What attends over ``over`` where its dim ``sharded`` is sharded.

    Over all tokens Ring works as over time; the other backends move the shard to the heads.
    """
    overlap = exchange_of(group).overlap
    # Which number of chunks is fastest is measured for DSP's stages alone.
    chunks = overlap.chunks if isinstance(overlap, FixedOverlap) and over != "all" else 1

    dim, stage = DIMS.index(sharded), _NAMES[over]
    where: Any = {"over": dim, "heads": 3, "size": layout.sizes[dim], "group": group, "stage": stage}

    def by_ulysses(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        return module.finish(ulysses(module.attend, *module.project(x, rotations), **where))

    def by_ulysses_in_chunks(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        project = partial(module.project, rotations=rotations)
        return ulysses_in_chunks(project, module.attend, module.finish, x, along=2, chunks=chunks, **where)

    def by_ring(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        query, key, value = module.project(x, rotations)
        batched = (module.batched(each) for each in (query, key, value))
        size = layout.size("time") * (layout.size("space") if over == "all" else 1)
        return module.finish(module.stored(ring(*batched, size=size, group=group, stage=stage), query))

    if backend == "ring":
        return by_ring
    return by_ulysses if chunks == 1 else by_ulysses_in_chunks


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels of x [T, B, S, C] without weights, times 1 + scale, plus shift [T, B, 1, C]."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def parameter_count(config: VideoDiTConfig) -> int:
    """Parameters of a :class:`VideoDiT`, counted without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoDiT(config).parameters())
