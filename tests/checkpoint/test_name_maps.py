"""Published weights under our names: against what their model computes, written down here anew, in fp64."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_dsp import cli
from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.convert import convert
from megatron_dsp.checkpoint.formats import deepspeed, safetensors
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.checkpoint.name_map import SHIPPED, apply_name_map, read_name_map
from megatron_dsp.checkpoint.parameters import parameters_of
from megatron_dsp.errors import UsageError
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig, part_names

HEADS, HIDDEN, DEPTH, CHANNELS, WORDS, TEXT = 3, 24, 2, 2, 5, 20
PATCH = 2, 2, 3
CONFIG = VideoDiTConfig(DEPTH, HIDDEN, HEADS, TEXT, patch=PATCH, channels=CHANNELS)


def _shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of STDiT3's state dict."""

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = {"rope.freqs": (HIDDEN // HEADS // 2,), "y_embedder.y_embedding": (WORDS, TEXT)}
    shapes |= {"x_embedder.proj.weight": (HIDDEN, CHANNELS, *PATCH), "x_embedder.proj.bias": (HIDDEN,)}
    for name in ("t_embedder", "fps_embedder"):
        shapes |= linear(f"{name}.mlp.0", 256, HIDDEN) | linear(f"{name}.mlp.2", HIDDEN, HIDDEN)
    shapes |= linear("t_block.1", HIDDEN, 6 * HIDDEN)
    shapes |= linear("y_embedder.y_proj.fc1", TEXT, HIDDEN) | linear("y_embedder.y_proj.fc2", HIDDEN, HIDDEN)
    for block in (f"{kind}_blocks.{number}" for kind in ("spatial", "temporal") for number in range(DEPTH)):
        shapes |= {f"{block}.scale_shift_table": (6, HIDDEN)}
        shapes |= {f"{block}.attn.{name}_norm.weight": (HIDDEN // HEADS,) for name in "qk"}
        shapes |= linear(f"{block}.attn.qkv", HIDDEN, 3 * HIDDEN) | linear(f"{block}.attn.proj", HIDDEN, HIDDEN)
        shapes |= linear(f"{block}.cross_attn.q_linear", HIDDEN, HIDDEN) | linear(f"{block}.cross_attn.proj", HIDDEN, HIDDEN)
        shapes |= linear(f"{block}.cross_attn.kv_linear", HIDDEN, 2 * HIDDEN)
        shapes |= linear(f"{block}.mlp.fc1", HIDDEN, 4 * HIDDEN) | linear(f"{block}.mlp.fc2", 4 * HIDDEN, HIDDEN)
    shapes |= {"final_layer.scale_shift_table": (2, HIDDEN)}
    return shapes | linear("final_layer.linear", HIDDEN, 2 * CHANNELS * math.prod(PATCH))


@pytest.fixture(scope="module")
def theirs() -> dict[str, Tensor]:
    """Random weights, of a size at which each matters."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) / (math.sqrt(shape[-1]) if len(shape) > 1 else 2)
        for name, shape in _shapes().items()
    }


@pytest.fixture
def published(tmp_path, theirs) -> Path:
    """A folder with them, as the Hugging Face hub has it."""
    folder = tmp_path / "published"
    folder.mkdir()
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    return folder


def _stdit3(weights: dict[str, Tensor], video: Tensor, t: Tensor, fps: float, text: Tensor, mask: Tensor) -> Tensor:
    """What STDiT3 computes of a video [B, channels, frames, height, width] at steps t [B]: the half that rectified flow uses.

    A frame has a square number of tokens.
    """
    w = {name: value.double() for name, value in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def waves(positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * 10000.0 ** -(torch.arange(count, dtype=torch.float64) / count)
        return angles.cos(), angles.sin()

    def number(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat(waves(x, 128), dim=-1))))

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[name]

    def turned(x: Tensor) -> Tensor:
        cos, sin = waves(torch.arange(x.shape[-2], dtype=torch.float64), x.shape[-1] // 2)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def self_attention(name: str, x: Tensor, temporal: bool) -> Tensor:  # [..., tokens, C]
        q, k, v = (heads(part) for part in linear(f"{name}.qkv", x).chunk(3, dim=-1))
        q, k = norm(q, f"{name}.q_norm.weight"), norm(k, f"{name}.k_norm.weight")
        q, k = (turned(q), turned(k)) if temporal else (q, k)
        weight = (q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)).softmax(-1)
        return linear(f"{name}.proj", (weight @ v).transpose(-2, -3).flatten(-2))

    def cross_attention(name: str, x: Tensor, y: Tensor) -> Tensor:  # x [B, T, S, C], y [B, L, C]
        q = heads(linear(f"{name}.q_linear", x.flatten(1, 2)))
        k, v = (heads(part) for part in linear(f"{name}.kv_linear", y).chunk(2, dim=-1))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(HIDDEN // HEADS)).masked_fill(~mask[:, None, None], -math.inf)
        return linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)).view(x.shape)

    def plain_norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()

    def block(name: str, x: Tensor, y: Tensor, modulation: Tensor, temporal: bool) -> Tensor:
        table = w[f"{name}.scale_shift_table"] + modulation.unflatten(-1, (6, HIDDEN))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (each[:, None, None] for each in table.unbind(1))
        mixed = plain_norm(x) * (1 + scale) + shift
        mixed = mixed.transpose(1, 2) if temporal else mixed
        mixed = self_attention(f"{name}.attn", mixed, temporal)
        x = x + gate * (mixed.transpose(1, 2) if temporal else mixed)
        x = x + cross_attention(f"{name}.cross_attn", x, y)
        inner = F.gelu(linear(f"{name}.mlp.fc1", plain_norm(x) * (1 + mlp_scale) + mlp_shift), approximate="tanh")
        return x + mlp_gate * linear(f"{name}.mlp.fc2", inner)

    x = F.conv3d(video, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=PATCH)  # [B, C, T, h, w]
    frames, high, wide = x.shape[2:]
    side = 32.0 / high  # 512 pixels a side, of 16 pixels a token
    columns, rows = (
        torch.cat(waves(torch.arange(n, dtype=torch.float64) * side, HIDDEN // 4)[::-1], dim=-1) for n in (wide, high)
    )
    positions = torch.cat([columns[None].expand(high, -1, -1), rows[:, None].expand(-1, wide, -1)], dim=-1)
    x = x.flatten(3).permute(0, 2, 3, 1) + positions.flatten(0, 1)
    time = number("t_embedder", t) + number("fps_embedder", torch.tensor([fps], dtype=torch.float64))
    modulation = linear("t_block.1", F.silu(time))
    y = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
    for index in range(DEPTH):
        x = block(f"spatial_blocks.{index}", x, y, modulation, False)
        x = block(f"temporal_blocks.{index}", x, y, modulation, True)
    shift, scale = (w["final_layer.scale_shift_table"] + time[:, None])[:, None].unbind(2)
    x = linear("final_layer.linear", plain_norm(x) * (1 + scale[:, :, None]) + shift[:, :, None])
    x = x.view(len(x), frames, high, wide, *PATCH, 2 * CHANNELS).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.reshape(len(x), 2 * CHANNELS, *video.shape[2:]).chunk(2, dim=1)[0]


def _with_frame_rate(weights: dict[str, Tensor], theirs: dict[str, Tensor], fps: float) -> dict[str, Tensor]:
    """What the note on ``fps_embedder`` says."""
    w = {name: value.double() for name, value in theirs.items()}
    angles = fps * 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    inner = w["fps_embedder.mlp.0.weight"] @ torch.cat([angles.cos(), angles.sin()]) + w["fps_embedder.mlp.0.bias"]
    rate = w["fps_embedder.mlp.2.weight"] @ F.silu(inner) + w["fps_embedder.mlp.2.bias"]
    bias = "embedding.timestep_embedding.mlp.2.bias"
    return {**weights, bias: weights[bias].double() + rate.roll(HIDDEN // 2)}


def test_stdit3_computes_the_same(tmp_path, published, theirs):
    done = convert(published, tmp_path / "ours", saver="safetensors", target=Target(), name_map=read_name_map("stdit3"))
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    model = VideoDiT(CONFIG).double()
    model.load_state_dict(_with_frame_rate(weights, theirs, fps=24))
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, CHANNELS, 6, 6, 9, generator=generator, dtype=torch.float64)  # 3 x 3 x 3 tokens
    text = torch.randn(2, WORDS, TEXT, generator=generator, dtype=torch.float64)
    mask = torch.arange(WORDS) < torch.tensor([[3], [WORDS]])
    t = torch.tensor([300.0, 925.0], dtype=torch.float64)
    expected = _stdit3(theirs, video, t, 24, text, mask)
    found = model(video.permute(2, 0, 1, 3, 4), (t / 1000).expand(3, 2), text, mask).permute(1, 2, 0, 3, 4)
    torch.testing.assert_close(-found, expected, rtol=1e-9, atol=1e-9)
    # A key's bias changes nothing that is computed.
    key, _ = theirs["spatial_blocks.1.cross_attn.kv_linear.bias"].chunk(2)
    assert torch.equal(weights["spatial_blocks.1.cross_attention.key.bias"], key)
    # The unconditional samples of theirs.
    null = theirs["y_embedder.y_embedding"].double().expand(2, -1, -1)
    expected = _stdit3(theirs, video, t, 24, null, torch.ones_like(mask))
    found = model(video.permute(2, 0, 1, 3, 4), (t / 1000).expand(3, 2), null, torch.ones_like(mask)).permute(1, 2, 0, 3, 4)
    torch.testing.assert_close(-found, expected, rtol=1e-9, atol=1e-9)
    assert any("fps_embedder.* is left out" in note for note in done.notes)
    assert json.loads((tmp_path / "ours" / "imported.json").read_text())["notes"] == done.notes
    assert "imported.json" in manifest.read(tmp_path / "ours").files


def test_what_is_imported_is_a_checkpoint_of_ours(tmp_path, published):
    """Names, their order, the tensor axis's dims and a pipeline's layers are those of our model."""
    target = Target(tensor=2, pipe=3, zero_stage=1)
    convert(published, tmp_path / "ours", saver="deepspeed", target=target, name_map=read_name_map("stdit3"))
    found = deepspeed.load(tmp_path / "ours")
    with torch.device("meta"):
        model = VideoDiT(CONFIG)
    assert found.layers == part_names(CONFIG)
    assert dict(found.parameters) == parameters_of(model)
    again = convert(tmp_path / "ours", tmp_path / "whole", saver="safetensors", target=Target())
    convert(published, tmp_path / "straight", saver="safetensors", target=Target(), name_map=read_name_map("stdit3"))
    whole, straight = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "straight"))
    assert again.tensors == len(whole) == len(straight)
    assert all(torch.equal(whole[name], straight[name]) for name in straight)
    source, _ = apply_name_map(safetensors.load(published), read_name_map("stdit3"))
    # DeepSpeed's flat groups have parameters in the order of the module.
    assert list(source.parameters) == [name for name, _ in model.named_parameters()]


def test_models_without_qk_norm_have_none_here(tmp_path, theirs):
    (tmp_path / "published").mkdir()
    plain = {name: value for name, value in theirs.items() if "_norm." not in name}
    save_file(plain, tmp_path / "published" / "model.safetensors")
    convert(tmp_path / "published", tmp_path / "a", saver="safetensors", target=Target(), name_map=read_name_map("stdit3"))
    names = load_file(tmp_path / "a" / "model.safetensors").keys()
    assert names
    assert not any("_norm" in name for name in names)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda w: w.pop("temporal_blocks.1.mlp.fc1.bias"), "lacks 1 of its parameters (temporal_blocks.1.mlp.fc1.bias)"),
        (lambda w: w.pop("spatial_blocks.0.attn.q_norm.weight"), "lacks 1 of its parameters (spatial_blocks.0.attn.q_norm"),
        (lambda w: w.update({"spatial_blocks.0.adapter": torch.zeros(2)}), "does not name (spatial_blocks.0.adapter)"),
        (lambda w: w.update({"count": torch.tensor(2)}), "does not name (count)"),
        (lambda w: w.update({"t_block.1.bias": torch.zeros(7)}), "embedding.modulation.bias cannot be made: reshape"),
        (lambda w: w.update({"x_embedder.proj.weight": torch.zeros(24, 2)}), "the map needs its dim"),
    ],
)
def test_other_models_are_refused(tmp_path, theirs, change, sign, capsys):
    weights = dict(theirs)
    change(weights)
    (tmp_path / "published").mkdir()
    save_file(weights, tmp_path / "published" / "model.safetensors")
    given = ["convert", "--load-dir", tmp_path / "published", "--save-dir", tmp_path / "ours", "--saver", "safetensors"]
    assert cli.main([*map(str, given), "--name-map", "stdit3"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --name-map stdit3: ")
    assert sign in error
    assert not (tmp_path / "ours").exists()


def test_the_command_says_what_is_left_out(tmp_path, published, capsys):
    given = [
        "convert",
        "--load-dir",
        published,
        "--save-dir",
        tmp_path / "ours",
        "--saver",
        "torch_dcp",
        "--name-map",
        "stdit3",
    ]
    assert cli.main(list(map(str, given))) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    for sign in ("fps_embedder.* is left out", "null_token (not in the source, begins with zeros)", "head.out.weight: "):
        assert any(sign in note for note in notes), sign


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (lambda record: record.pop("divided"), "wrong or missing: divided"),
        (lambda record: record.update(more=1), "wrong or missing: more"),
        (lambda record: record["parameters"][0].update(theris="x"), "theris"),
        (lambda record: record["parameters"][0].update(operations=[["turn", 0]]), "no such operations, values or sizes: turn"),
        (lambda record: record["parameters"][0].update(operations=[["first", 0, "width"]]), "values or sizes: width"),
    ],
)
def test_files_that_are_no_maps_are_refused(tmp_path, change, sign):
    record = json.loads(SHIPPED["stdit3"].read_text())
    change(record)
    path = tmp_path / "map.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UsageError, match="is no name map") as error:
        read_name_map(str(path))
    assert sign in str(error.value)
    path.write_text("[1")
    with pytest.raises(UsageError, match="is no name map"):
        read_name_map(str(path))
    with pytest.raises(UsageError, match=r"cannot be read .*give one of latte, stdit3"):
        read_name_map("stdit4")
