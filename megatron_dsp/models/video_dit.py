"""ST-DiT: a factorised video diffusion transformer, after STDiT3 of Open-Sora (https://github.com/hpcaitech/Open-Sora).

A layer pair is one block that attends over space and one that attends over time. Activations stay in storage order
[T, B, S, C] from the first layer to the last: T token frames, B batch, S spatial tokens, C hidden size. The modules
compute on whatever part of T or S they are given and know nothing of ranks; ``block_runner`` alone says where the shard
lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_dsp.errors import UsageError
from megatron_dsp.models.attention import CrossAttention, Over, OverRanks, SelfAttention
from megatron_dsp.models.block_runner import Activations, BlockRunner
from megatron_dsp.models.embeddings import (
    ConditioningEmbedding,
    TimestepEmbedding,
    grid_size,
    patchify,
    space_positions,
    unpatchify,
)
from megatron_dsp.models.norms import layer_norm
from megatron_dsp.models.video_dit_config import VideoDiTConfig, check_inputs
from megatron_dsp.reshard import WHOLE_ENDS, Activation, Ends
from megatron_dsp.tensor import ColumnParallelLinear, RowParallelLinear, TensorParallel, initialise

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
        self.tensor = tensor
        self._compile_options: tuple[tuple[str, Any], ...] | None = None
        self.modulation_table = nn.Parameter(torch.empty(6, config.hidden))
        self.self_attention = SelfAttention(config.hidden, config.heads, over, config.qk_norm, tensor)
        self.cross_attention = CrossAttention(config.hidden, config.heads, tensor)
        self.mlp = nn.Sequential(
            tensor.column(config.hidden, inner), nn.GELU(approximate="tanh"), tensor.row(inner, config.hidden)
        )

    def forward(
        self,
        x: Activation,
        modulation: Tensor,
        tokens: Tensor,
        mask: Tensor,
        rotations: Tensor | None = None,
        over_ranks: OverRanks | None = None,
        ends: Ends = WHOLE_ENDS,
    ) -> Activation:
        """Run the block on x [T, B, S, C], all of the dim that it attends over and any part of the other.

        Args:
            x: [T, B, S, C].
            modulation: [T, B, 6 C], of the same frames.
            tokens: conditioning tokens, [B, L, C].
            mask: [B, L], bool, True = attend, at least one a sample.
            rotations: rotary positions of the frames, [T, 1, 1, 1, head size / 2, 2]; not for attention over space.
            over_ranks: attention where x has a shard of a dim that the block attends over.
            ends: how tokens enter and leave, where ``x`` and what is returned may be on their way.
        """
        arguments = x, modulation, tokens, mask, rotations, over_ranks, ends
        options = self._compile_options
        if options is None:
            return self._run(*arguments)
        if over_ranks is None and ends is WHOLE_ENDS:
            return _compiled(Block._run, options)(self, *arguments)
        # What travels between the parts has an order that no compiler knows of.
        return self._run(*arguments, part=lambda function: _compiled(function, options))

    def compile(self, **options: Any) -> None:
        """Let ``torch.compile`` with ``options`` run the block from now on.

        Where it runs whole, that is one graph. Where its ends are cut, or it attends over a shard, its ends and what is between
        them have a graph each, and collectives stand outside. Blocks of one kind and one shape share their graphs.
        """
        self._compile_options = tuple(sorted(options.items()))

    def _run(
        self,
        x: Activation,
        modulation: Tensor,
        tokens: Tensor,
        mask: Tensor,
        rotations: Tensor | None,
        over_ranks: OverRanks | None,
        ends: Ends,
        part: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> Activation:
        """As `forward`; ``part`` gives what runs a part of the block."""
        table = self.tensor.beside(self.modulation_table) + modulation.unflatten(-1, self.modulation_table.shape)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unsqueeze(2).unbind(3)  # each [T, B, 1, C]

        def of_frames(side: Tensor) -> Tensor:
            return ends.local(ends.local(side, dim=0, name="time"), dim=1, name="batch")

        def enter(x: Tensor) -> tuple[Tensor, ...]:
            if over_ranks is not None:
                return x, part(modulated_norm)(x, of_frames(shift), of_frames(scale))
            return x, *part(Block._enter)(self, x, of_frames(shift), of_frames(scale))

        def leave(x: Tensor) -> Tensor:
            return part(Block._leave)(self, x, of_frames(mlp_shift), of_frames(mlp_scale), of_frames(mlp_gate))

        whole, *entered = ends.enter(enter, x)
        if over_ranks is None:
            whole = part(Block._mix)(self, whole, gate, *entered, rotations, tokens, mask)
        else:
            (normed,) = entered
            attended = over_ranks(self.self_attention, normed, rotations)
            whole = part(Block._add)(self, whole, gate, attended, tokens, mask)
        return ends.leave(leave, whole)

    def _enter(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attention.to_heads(modulated_norm(x, shift, scale))

    def _mix(
        self,
        x: Tensor,
        gate: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotations: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
    ) -> Tensor:
        return self._add(x, gate, self.self_attention(query, key, value, rotations), tokens, mask)

    def _add(self, x: Tensor, gate: Tensor, attended: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        x = torch.addcmul(x, gate, attended)
        return x + self.cross_attention(x, tokens, mask)

    def _leave(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return torch.addcmul(x, gate, self.mlp(self.tensor.enter(modulated_norm(x, shift, scale))))

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
        runner = BlockRunner(self.config, self.tensor, group, backend, self.recompute)
        patches = runner.run([*self.blocks(), self.head], entering, space=h * w, first=0)
        return unpatchify(patches, self.config.patch, video.shape)


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


@lru_cache(maxsize=64)
def _compiled(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """Not of one block: what is compiled takes the block as an argument, and so serves all blocks of its kind."""
    return torch.compile(function, **dict(options))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the channels of x [T, B, S, C] without weights, times 1 + scale, plus shift [T, B, 1, C]."""
    return torch.addcmul(shift, layer_norm(x), 1 + scale)


def parameter_count(config: VideoDiTConfig) -> int:
    """Parameters of a :class:`VideoDiT`, counted without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoDiT(config).parameters())
