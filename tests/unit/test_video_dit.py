"""The video transformer in one process: what its modules mix and what they move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_dsp.errors import UsageError
from megatron_dsp.models.attention import SelfAttention, rotate
from megatron_dsp.models.embeddings import patchify, space_positions, time_rotations, unpatchify
from megatron_dsp.models.video_dit import PRESETS, Block, VideoDiT, VideoDiTConfig, parameter_count
from megatron_dsp.tensor import TensorParallel

CONFIG = VideoDiTConfig(layers=2, hidden=16, heads=2, conditioning_size=6, channels=2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def noisy_model(config: VideoDiTConfig = CONFIG, dtype: torch.dtype = torch.float64) -> VideoDiT:
    """A model none of whose parameters is 0, so that every path through it shows."""
    model = VideoDiT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def inputs(config: VideoDiTConfig = CONFIG, frames: int = 3, batch: int = 2, height: int = 4, width: int = 6) -> dict:
    token_frames = -(-frames // config.patch[0])
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[0, 2] = False
    return {
        "video": torch.randn(frames, batch, config.channels, height, width, dtype=torch.float64),
        "timesteps": torch.rand(token_frames, batch, dtype=torch.float64),
        "conditioning": torch.randn(batch, 3, config.conditioning_size, dtype=torch.float64),
        "conditioning_mask": mask,
    }


def changed(before: Tensor, after: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Where two tensors differ anywhere along ``dims``."""
    return (before != after).any(dim=dims)


# Shapes and sizes


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 4, 4)])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 1, 1), (3, 5, 7), (5, 8, 9)])
def test_any_size_comes_back(patch: tuple[int, int, int], frames: int, height: int, width: int) -> None:
    config = replace(CONFIG, patch=patch, layers=1)
    arguments = inputs(config, frames=frames, height=height, width=width)
    video = arguments["video"]
    velocity = noisy_model(config)(**arguments)
    assert velocity.shape == video.shape
    assert velocity.isfinite().all()
    assert torch.equal(unpatchify(patchify(video, patch), patch, video.shape), video)


def test_a_patch_holds_the_pixels_of_one_place() -> None:
    video = torch.arange(4 * 4 * 6).view(4, 1, 1, 4, 6)
    patches = patchify(video, (2, 2, 2))
    assert patches.shape == (2, 1, 6, 8)
    assert torch.equal(patches[1, 0, 4], video[2:, 0, 0, 2:, 2:4].flatten())  # second row, second of three columns


@pytest.mark.parametrize(("name", "count"), [("720m", 720e6), ("3b", 3e9)])
def test_presets_have_the_size_of_their_name(name: str, count: float) -> None:
    assert parameter_count(PRESETS[name]) == pytest.approx(count, rel=0.05)


def test_parameter_count_is_that_of_the_model() -> None:
    assert parameter_count(CONFIG) == sum(parameter.numel() for parameter in VideoDiT(CONFIG).parameters())


def test_positions_belong_to_places_not_to_resolutions() -> None:
    like = torch.empty(16)
    coarse, fine = space_positions(2, 3, like).view(2, 3, 16), space_positions(4, 6, like).view(4, 6, 16)
    torch.testing.assert_close(fine[::2, ::2], coarse)
    assert len(fine.flatten(0, 1).unique(dim=0)) == 24


# What mixes what


@pytest.mark.parametrize("over", ["space", "time"])
def test_a_block_mixes_only_the_dim_it_attends_over(over: str) -> None:
    block = noisy_model().get_submodule("spatial_blocks.0" if over == "space" else "temporal_blocks.0")
    x = torch.randn(3, 2, 4, 16, dtype=torch.float64)
    modulation, tokens = torch.randn(3, 2, 96, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    rotations = time_rotations(3, 8, x) if over == "time" else None
    poked = x.clone()
    poked[1, 0, 2] += torch.randn(16)  # a constant would vanish in the norm
    before, after = (block(y, modulation, tokens, mask, rotations) for y in (x, poked))
    expected = torch.zeros(3, 2, 4, dtype=torch.bool)
    if over == "space":
        expected[1, 0, :] = True
    else:
        expected[:, 0, 2] = True
    assert torch.equal(changed(before, after, (3,)), expected)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("over", ["space", "time"])
def test_self_attention_equals_its_definition(over: str, qk_norm: bool) -> None:
    layer = SelfAttention(16, 2, over, qk_norm, TensorParallel()).double()
    x = torch.randn(3, 2, 4, 16, dtype=torch.float64)
    query, key, value = (projection(x).view(3, 2, 4, 2, 8) for projection in (layer.query, layer.key, layer.value))
    if qk_norm:
        query, key = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (query, key))
    scores, weighted = (
        ("tbqhd,tbkhd->tbhqk", "tbhqk,tbkhd->tbqhd")
        if over == "space"
        else (
            "qbshd,kbshd->bshqk",
            "bshqk,kbshd->qbshd",
        )
    )
    weights = (torch.einsum(scores, query, key) / 8**0.5).softmax(-1)
    expected = layer.out(torch.einsum(weighted, weights, value).reshape(3, 2, 4, 16))
    torch.testing.assert_close(layer(*layer.to_heads(x)), expected, rtol=1e-12, atol=1e-12)


def test_a_block_equals_its_definition() -> None:
    block = noisy_model().spatial_blocks[0]
    x, tokens = torch.randn(3, 2, 4, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    modulation, mask = torch.randn(3, 2, 96, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
        (block.modulation_table[i] + modulation[..., 16 * i : 16 * i + 16])[:, :, None] for i in range(6)
    )

    def norm(y: Tensor) -> Tensor:
        return (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    y = x + gate * block.self_attention(*block.self_attention.to_heads(norm(x) * (1 + scale) + shift))
    y = y + block.cross_attention(y, tokens, mask)
    y = y + mlp_gate * block.mlp(norm(y) * (1 + mlp_scale) + mlp_shift)
    torch.testing.assert_close(block(x, modulation, tokens, mask), y, rtol=1e-12, atol=1e-12)


def test_a_timestep_changes_only_its_own_frame_and_sample() -> None:
    model, arguments = noisy_model(), inputs()
    timesteps = arguments["timesteps"]
    later = timesteps.clone()
    later[1, 0] += 1e-3
    before, after = (model.embedding.modulation(model.embedding.timestep_embedding(t)) for t in (timesteps, later))
    expected = torch.zeros(3, 2, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(changed(before, after, (2,)), expected)

    x, tokens = torch.randn(3, 2, 4, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    block, mask = model.spatial_blocks[0], torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(changed(block(x, before, tokens, mask), block(x, after, tokens, mask), (2, 3)), expected)
    assert torch.equal(changed(model.head(x, before[..., :16]), model.head(x, after[..., :16]), (2, 3)), expected)


def test_rotations_make_scores_depend_on_the_distance_of_frames() -> None:
    query, key = torch.randn(2, 1, 1, 1, 1, 8, dtype=torch.float64)
    rotations = time_rotations(6, 8, query)
    assert rotations.dtype == torch.float64
    scores = torch.einsum("q...d,k...d->qk", rotate(query, rotations), rotate(key, rotations))
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-12, atol=1e-12)
    assert len(scores[0].round(decimals=6).unique()) == 6


@pytest.mark.parametrize("dim", [0, 3, 4], ids=["time", "rows", "columns"])
def test_the_order_of_tokens_matters(dim: int) -> None:
    model, arguments = noisy_model(replace(CONFIG, patch=(1, 1, 1))), inputs(replace(CONFIG, patch=(1, 1, 1)))
    arguments["timesteps"][:] = 0.5
    forwards, backwards = model(**arguments), model(**{**arguments, "video": arguments["video"].flip(dim)}).flip(dim)
    assert (forwards - backwards).abs().max() > 1e-3


# Conditioning


def test_masked_tokens_do_not_matter_and_others_do() -> None:
    model, arguments = noisy_model(), inputs()
    before = model(**arguments)
    conditioning = arguments["conditioning"].clone()
    conditioning[0, 2] += 1  # the only masked token
    assert torch.equal(model(**{**arguments, "conditioning": conditioning}), before)
    conditioning[0, 1] += 1
    after = model(**{**arguments, "conditioning": conditioning})
    assert changed(before, after, (0, 2, 3, 4)).tolist() == [True, False]


def test_a_dropped_sample_sees_only_the_null_token() -> None:
    model, arguments = noisy_model(), inputs()
    drop = torch.tensor([True, False])
    dropped = model(**arguments, conditioning_drop=drop)
    assert changed(model(**arguments), dropped, (0, 2, 3, 4)).tolist() == [True, False]
    other = {**arguments, "conditioning": torch.randn_like(arguments["conditioning"])}
    assert torch.equal(model(**other, conditioning_drop=drop)[:, 0], dropped[:, 0])
    with torch.no_grad():
        model.embedding.conditioning_embedding.null_token += 1
    assert changed(dropped, model(**arguments, conditioning_drop=drop), (0, 2, 3, 4)).tolist() == [True, False]


def test_a_sample_without_tokens_is_unconditional_and_finite() -> None:
    model, arguments = noisy_model(), inputs()
    dropped = model(**arguments, conditioning_drop=torch.tensor([True, False]))
    arguments["conditioning_mask"][0] = False
    arguments["conditioning"].requires_grad_()
    velocity = model(**arguments)
    assert torch.equal(velocity, dropped)
    velocity.square().sum().backward()
    for tensor in [arguments["conditioning"], *model.parameters()]:
        assert tensor.grad.isfinite().all()


# Precision and initialisation


def test_a_new_model_predicts_zero_and_can_learn() -> None:
    model, arguments = VideoDiT(CONFIG).double(), inputs()
    velocity = model(**arguments)
    assert not velocity.any()
    (velocity - 1).square().sum().backward()
    assert model.head.out.weight.grad.any()
    assert model.spatial_blocks[0].self_attention.query.weight.any()


def test_every_parameter_learns() -> None:
    model = noisy_model()
    model(**inputs(), conditioning_drop=torch.tensor([True, False])).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("attention.key.bias"):  # shifts all scores of a query alike, which softmax ignores
            assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_of_another_dtype_take_the_same_inputs(dtype: torch.dtype) -> None:
    model, arguments = noisy_model(), inputs()
    expected = model(**arguments)
    velocity = model.to(dtype)(**arguments)
    assert velocity.dtype == dtype
    error = (velocity.double() - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-5)
    velocity.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_timesteps_keep_their_precision_in_a_bf16_model() -> None:
    embedding = noisy_model(dtype=torch.bfloat16).embedding.timestep_embedding
    near = torch.tensor([[0.898, 0.9]])  # one bf16 number
    assert near.bfloat16().unique().numel() == 1
    assert not torch.equal(*embedding(near)[0])


# Copies


def activation_copies(run: Callable[[], object], size: int) -> list[str]:
    """The operators that moved at least ``size`` elements, apart from a linear layer's bias going into its output."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    found = []
    for event in profiler.events():
        in_linear = event.cpu_parent is not None and event.cpu_parent.name == "aten::addmm"
        moves = event.name in ("aten::copy_", "aten::cat") and not in_linear
        # aten::cat's first argument is a list, whose shapes the profiler gives as a list of lists or not at all.
        if moves and (event.name == "aten::cat" or torch.Size(event.input_shapes[0]).numel() >= size):
            found.append(event.name)
    return found


def test_copies_are_seen() -> None:
    x = torch.randn(4, 2, 6, 32)
    assert activation_copies(lambda: x.transpose(0, 2).contiguous(), x.numel()) == ["aten::copy_"]
    assert activation_copies(lambda: torch.cat([x, x]), x.numel()) == ["aten::cat"]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("over", ["space", "time"])
def test_self_attention_copies_nothing(over: str, qk_norm: bool) -> None:
    layer = SelfAttention(32, 4, over, qk_norm, TensorParallel())
    x = torch.randn(4, 2, 6, 32, requires_grad=True)
    rotations = time_rotations(4, 8, x) if over == "time" else None
    assert activation_copies(lambda: layer(*layer.to_heads(x), rotations), x.numel()) == []


def test_cross_attention_never_copies_the_activation() -> None:
    layer = noisy_model(replace(CONFIG, hidden=32), torch.float32).spatial_blocks[0].cross_attention
    x, mask = torch.randn(4, 2, 6, 32), torch.ones(2, 3, dtype=torch.bool)
    tokens = torch.randn(2, 3, 32)
    assert activation_copies(lambda: layer(x, tokens, mask), x.numel()) == []
    alone = x[:, :1].contiguous()
    assert activation_copies(lambda: layer(alone, tokens[:1], mask[:1]), tokens[:1].numel() * 4) == []


@pytest.mark.parametrize("shape", [(0, 2, 4, 16), (3, 2, 0, 16)], ids=["no frames", "no tokens"])
@pytest.mark.parametrize("over", ["space", "time"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_empty_shard_runs_with_zero_gradients(shape: tuple[int, ...], over: str, dtype: torch.dtype) -> None:
    block = Block(CONFIG, over, TensorParallel()).to(dtype)
    x, tokens = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.randn(2, 3, 16, dtype=dtype)
    modulation, mask = torch.randn(shape[0], 2, 96, dtype=dtype), torch.ones(2, 3, dtype=torch.bool)
    y = block(x, modulation, tokens, mask, time_rotations(shape[0], 8, x) if over == "time" else None)
    assert y.shape == shape
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "multiple of 6"),
        ({"heads": 16}, "even head size"),
        ({"hidden": 18, "heads": 1}, "multiple of 4"),
        ({"patch": (1, 0, 2)}, "three sizes"),
        ({"layers": 0}, "layers=0"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": torch.randn(3, 2, 3, 4, 6)}, "2 channels"),
        ({"timesteps": torch.rand(3)}, "timesteps"),
        ({"timesteps": torch.rand(4, 2)}, "4 token frames"),
        ({"conditioning": torch.randn(2, 0, 6)}, "at least one token"),
        ({"conditioning": torch.randn(2, 3, 5)}, r"\[2, tokens, 6\]"),
        ({"conditioning_mask": torch.ones(2, 3)}, "conditioning_mask is torch.float32"),
        ({"conditioning_drop": torch.tensor([True])}, "conditioning_drop"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoDiT(CONFIG).double()(**{**inputs(), **change})


@pytest.mark.long
def test_a_compiled_model_takes_clips_of_any_size():
    """As one graph, in which a plan of layouts is a constant."""
    model = VideoDiT(VideoDiTConfig(layers=2, hidden=16, heads=2, conditioning_size=6, full_attention_every=2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for frames, height in ((3, 4), (4, 6), (5, 8)):
        inputs = torch.randn(frames, 1, 3, height, 4), torch.rand(frames, 1), torch.randn(1, 3, 6), mask
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
