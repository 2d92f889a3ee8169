"""ST-DiT: a factorised video diffusion transformer, after STDiT3 of Open-Sora (https://github.com/hpcaitech/Open-Sora).

A layer pair is one block that attends over space and one that attends over time. Activations stay in storage order
[T, B, S, C] from the first layer to the last: T token frames, B batch, S spatial tokens, C hidden size. The modules
compute on whatever part of T or S they are given and know nothing of ranks; ``VideoDiT.forward`` alone says where the
shard lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dsp.embedded import ring, ulysses, ulysses_in_chunks
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout
from megatron_dsp.models.attention import CrossAttention, OverRanks, SelfAttention
from megatron_dsp.models.embeddings import (
    ConditioningEmbedding,
    TimestepEmbedding,
    grid_size,
    patchify,
    space_positions,
    time_rotations,
    unpatchify,
)
from megatron_dsp.reshard import FixedOverlap, Region, Stage
from megatron_dsp.reshard.exchange import exchange_of

DIMS = ("time", "batch", "space", "channels")
# The dim that is sharded while a stage runs: with DSP one that the stage does not mix, with Ulysses and Ring always the same.
SHARDED_DIM = {"embedding": "time", "spatial": "time", "temporal": "space", "head": "time"}
SHARDED_DIM_EMBEDDED = dict.fromkeys(SHARDED_DIM, "time")


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
    """

    layers: int
    hidden: int
    heads: int
    conditioning_size: int
    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 3
    mlp_ratio: float = 4.0
    qk_norm: bool = True

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

    def __init__(self, config: VideoDiTConfig, over: Literal["space", "time"]) -> None:
        super().__init__()
        inner = int(config.hidden * config.mlp_ratio)
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden))
        self.self_attention = SelfAttention(config.hidden, config.heads, over, config.qk_norm)
        self.cross_attention = CrossAttention(config.hidden, config.heads)
        self.mlp = nn.Sequential(nn.Linear(config.hidden, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, config.hidden))

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
            rotations: rotary positions of the frames, [T, 1, 1, 1, head size / 2], complex.
            over_ranks: attention where x has a shard of the dim that the block attends over.
        """
        table = self.modulation_table + modulation.unflatten(-1, self.modulation_table.shape)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unsqueeze(2).unbind(3)  # each [T, B, 1, C]
        x = torch.addcmul(x, gate, self.self_attention(modulated_norm(x, shift, scale), rotations, over_ranks))
        x = x + self.cross_attention(x, tokens, mask)
        return torch.addcmul(x, mlp_gate, self.mlp(modulated_norm(x, mlp_shift, mlp_scale)))


class Head(nn.Module):
    """From tokens to flattened patches: a modulated norm and a linear layer."""

    def __init__(self, hidden: int, patch_channels: int) -> None:
        super().__init__()
        self.modulation_table = nn.Parameter(torch.empty(2, hidden))
        self.out = nn.Linear(hidden, patch_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [T, B, S, C] and the embedding of its frames' times [T, B, C] -> patches [T, B, S, patch channels]."""
        shift, scale = (self.modulation_table + time[:, :, None]).unsqueeze(2).unbind(3)
        return self.out(modulated_norm(x, shift, scale))


class VideoDiT(nn.Module):
    """Predicts the velocity of a noisy video from diffusion times and conditioning tokens."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        depth, rows, columns = config.patch
        patch_channels = config.channels * depth * rows * columns
        self.patch_embedding = nn.Linear(patch_channels, config.hidden)
        self.timestep_embedding = TimestepEmbedding(config.hidden)
        self.conditioning_embedding = ConditioningEmbedding(config.conditioning_size, config.hidden)
        self.modulation = nn.Linear(config.hidden, 6 * config.hidden)
        self.spatial_blocks = nn.ModuleList(Block(config, over="space") for _ in range(config.layers))
        self.temporal_blocks = nn.ModuleList(Block(config, over="time") for _ in range(config.layers))
        self.head = Head(config.hidden, patch_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters: blocks begin as the identity, the output as 0 (adaLN-zero, arXiv 2212.09748)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, Block):
                nn.init.zeros_(module.modulation_table)
        nn.init.normal_(self.conditioning_embedding.null_token, std=0.02)
        nn.init.zeros_(self.head.modulation_table)
        for block in [*self.spatial_blocks, *self.temporal_blocks]:
            nn.init.zeros_(block.cross_attention.out.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.out.weight)

    def forward(
        self,
        video: Tensor,
        timesteps: Tensor,
        conditioning: Tensor,
        conditioning_mask: Tensor,
        conditioning_drop: Tensor | None = None,
        *,
        group: ProcessGroup | None = None,
        backend: Literal["dsp", "ulysses", "ring"] = "dsp",
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
        self._check(video, timesteps, conditioning, conditioning_mask, conditioning_drop)
        token_frames, batch = timesteps.shape
        h, w = grid_size(video.shape[3], video.shape[4], self.config.patch)
        sizes = (token_frames, batch, h * w, self.config.hidden)
        over_ranks = None if group is None or backend == "dsp" else attention_over_ranks(backend, token_frames, group)
        sharded = SHARDED_DIM if over_ranks is None else SHARDED_DIM_EMBEDDED
        region = Region(Layout(DIMS, sizes, sharded=sharded["embedding"]), group)
        self._check_frames(video.shape[0], region, token_frames)

        x = self.patch_embedding(patchify(video.to(self.patch_embedding.weight.dtype), self.config.patch))
        x = x + space_positions(h, w, like=x)
        time = self.timestep_embedding(timesteps)
        modulation = self.modulation(F.silu(time))
        tokens, mask = self.conditioning_embedding(conditioning, conditioning_mask, conditioning_drop)
        rotations = time_rotations(token_frames, self.config.hidden // self.config.heads, like=x)

        def local(side: Tensor, *names: str) -> Tensor:
            for dim, name in enumerate(names):
                side = region.local(side, dim=dim, name=name)
            return side

        def spatial(block: nn.Module, x: Tensor) -> Tensor:
            return block(x, local(modulation, "time", "batch"), local(tokens, "batch"), local(mask, "batch"))

        def temporal(block: nn.Module, x: Tensor) -> Tensor:
            sides = local(modulation, "time", "batch"), local(tokens, "batch"), local(mask, "batch"), local(rotations, "time")
            return block(x, *sides, over_ranks)

        stages = []
        for i, (over_space, over_time) in enumerate(zip(self.spatial_blocks, self.temporal_blocks, strict=True)):
            stages.append(Stage(partial(spatial, over_space), sharded["spatial"], f"spatial {i}"))
            stages.append(Stage(partial(temporal, over_time), sharded["temporal"], f"temporal {i}"))
        stages.append(Stage(lambda x: self.head(x, local(time, "time", "batch")), sharded["head"], "head"))
        patches = region.run(stages, x, independent="batch")
        return unpatchify(patches, self.config.patch, video.shape)

    def _check(self, video: Tensor, timesteps: Tensor, conditioning: Tensor, mask: Tensor, drop: Tensor | None) -> None:
        """Refuse arguments that do not fit the config or each other."""
        if video.ndim != 5 or video.shape[2] != self.config.channels:
            raise UsageError(
                f"video has shape {tuple(video.shape)}; it must be [frames, batch, {self.config.channels} channels, "
                "height, width], with the channels of the config"
            )
        batch = video.shape[1]
        if timesteps.ndim != 2 or timesteps.shape[1] != batch:
            raise UsageError(
                f"timesteps have shape {tuple(timesteps.shape)}; they must be "
                f"[token frames of the whole clip, {batch}] for this batch"
            )
        size = self.config.conditioning_size
        if conditioning.ndim != 3 or conditioning.shape[::2] != (batch, size) or conditioning.shape[1] == 0:
            raise UsageError(
                f"conditioning has shape {tuple(conditioning.shape)}; it must be [{batch}, tokens, {size}] with at "
                "least one token: for samples without any, pass one and mask it"
            )
        for name, tensor, shape in (("mask", mask, conditioning.shape[:2]), ("drop", drop, conditioning.shape[:1])):
            if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bool):
                raise UsageError(
                    f"conditioning_{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"it must be bool of shape {tuple(shape)}"
                )

    def _check_frames(self, frames: int, region: Region, token_frames: int) -> None:
        """Refuse frames that are not those of this rank's token frames."""
        depth = self.config.patch[0]
        start, stop = region.range("time")
        most = (stop - start) * depth
        least = most - depth + 1 if start < stop == token_frames else most
        if not least <= frames <= most:
            raise ValueError(
                f"video has {frames} frames, but {stop - start} of the clip's {token_frames} token frames (of {depth} "
                f"frames each) belong here: give it {least} to {most} frames, or timesteps for other token frames"
            )


def attention_over_ranks(backend: str, frames: int, group: ProcessGroup) -> OverRanks:
    """What attends over time, of ``frames`` token frames, where time is sharded."""
    overlap = exchange_of(group).overlap
    # Which number of chunks is fastest is measured for DSP's stages alone.
    chunks = overlap.chunks if isinstance(overlap, FixedOverlap) else 1

    where: Any = {"over": 0, "heads": 3, "size": frames, "group": group, "stage": "temporal"}

    def by_ulysses(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        return module.finish(ulysses(module.attend, *module.project(x, rotations), **where))

    def by_ulysses_in_chunks(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        project = partial(module.project, rotations=rotations)
        return ulysses_in_chunks(project, module.attend, module.finish, x, along=2, chunks=chunks, **where)

    def by_ring(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        query, key, value = module.project(x, rotations)
        batched = (module.batched(each) for each in (query, key, value))
        return module.finish(module.stored(ring(*batched, size=frames, group=group, stage="temporal"), query))

    return {"ulysses": by_ulysses if chunks == 1 else by_ulysses_in_chunks, "ring": by_ring}[backend]


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels of x [T, B, S, C] without weights, times 1 + scale, plus shift [T, B, 1, C]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def parameter_count(config: VideoDiTConfig) -> int:
    """Parameters of a :class:`VideoDiT`, counted without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoDiT(config).parameters())
