"""The video transformer on several ranks against one process, in fp64, with noise on zero-initialised parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap

LAYERS = 2


def compare(
    config: VideoDiTConfig, T: int, H: int, W: int, backend: str = "dsp", *, recompute: bool = False
) -> tuple[dsp.Ledger, int]:
    """Compare outputs and averaged gradients with one process; what was moved, and the samples of the batch."""
    group, patch = dist.group.WORLD, config.patch
    rank, size = group.rank(), group.size()
    torch.manual_seed(0)
    model = VideoDiT(config, recompute=recompute).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    B, tokens = 2, -(-T // patch[0])
    video = torch.randn(T, B, 3, H, W, dtype=torch.float64)
    weight = torch.linspace(0.5, 2, video.numel(), dtype=torch.float64).view_as(video)
    side = (
        torch.rand(tokens, B, dtype=torch.float64),
        torch.randn(B, 3, 6, dtype=torch.float64),
        torch.tensor([[True, True, False], [True, False, False]]),
        torch.tensor([False, True]),
    )
    expected = model(video, *side)
    (expected**2 * weight).mean().backward()
    references = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    start, stop = dsp.shard_range(tokens, size, rank)
    frames = slice(start * patch[0], min(stop * patch[0], T))
    with dsp.ledger() as moved:
        output = model(video[frames], *side, group=group, backend=backend)
        (output**2 * weight[frames]).sum().mul(size / video.numel()).backward()
    torch.testing.assert_close(output, expected[frames], rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        # Key biases have no gradient but rounding: hence the floor.
        error = (parameter.grad / size - references[name]).abs() - 1e-10 * references[name].abs()
        assert error.max() < 1e-13, name
    return moved, B


def _compare(T: int, H: int, W: int, patch: tuple[int, int, int], backend: str, overlap: FixedOverlap | None = None) -> None:
    group = dist.group.WORLD
    set_overlap(group, overlap)
    rank, size, tokens = group.rank(), group.size(), -(-T // patch[0])
    start, stop = dsp.shard_range(tokens, size, rank)
    config = VideoDiTConfig(layers=LAYERS, hidden=16, heads=2, conditioning_size=6, patch=patch)
    moved, B = compare(config, T, H, W, backend)
    if backend != "dsp":
        calls = {operation: calls for operation, (calls, _) in moved.by("operation").items()}
        # A layer: Ulysses takes q, k, v there and the result back; Ring sends blocks round, and their gradients.
        chunks = 1 if overlap is None else overlap.chunks
        name, forward, backward = (
            ("switch", 2 * chunks, 2 * chunks) if backend == "ulysses" else ("ring", size - 1, 2 * size - 1)
        )
        assert calls == {name: LAYERS * forward, name + " adjoint": LAYERS * backward}
        return
    # Two switches a layer pair, forward and backward, of the bytes that the shards say. The last one is of tokens, or of
    # patches behind the head: of what is narrower.
    S = -(-H // patch[1]) * -(-W // patch[2])
    T_r, S_r = stop - start, dsp.shard_sizes(S, size)[rank]
    there, back = T_r * B * (S - S_r) * 8, (tokens - T_r) * B * S_r * 8  # bytes of a channel
    calls = 2 * LAYERS
    if overlap is not None:  # chunks of time, of space, or slices of the batch
        chunks = {"time": min(overlap.chunks, tokens // size), "space": min(overlap.chunks, S // size), "batch": B}
        dims = ("time", "space") if overlap.along == "sharded" else (overlap.along, overlap.along)
        calls = LAYERS * chunks[dims[0]] + (LAYERS - 1) * chunks[dims[1]] + 1
        if config.patch_channels > 16:  # the last one is between stages too
            calls += chunks[dims[1]] - 1
    last = min(16, config.patch_channels)
    assert moved.by("operation") == {
        "switch": (calls, 16 * (LAYERS * there + (LAYERS - 1) * back) + last * back),
        "switch adjoint": (calls, 16 * (LAYERS * back + (LAYERS - 1) * there) + last * there),
    }
    assert sorted(moved.by("stage")) == ["head" if last == 16 else "output", "spatial 1", "temporal 0", "temporal 1"]


@pytest.mark.parametrize(
    ("T", "H", "W", "patch"),
    [(4, 4, 8, (1, 2, 2)), (5, 5, 7, (1, 2, 2)), (7, 4, 6, (2, 2, 2)), (2, 2, 4, (1, 2, 2))],
    ids=["even", "uneven", "patches of two frames", "fewer frames and tokens than ranks"],
)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_outputs_gradients_and_bytes(ranks, size, T, H, W, patch):
    ranks(size, _compare, T, H, W, patch, "dsp")


@pytest.mark.parametrize(
    ("cut", "along"),
    [
        *(("stages", along) for along in ("sharded", "batch", "time", "space")),
        ("ends", "space"),
        ("ends", "time"),
        ("leave", "batch"),
    ],
)
@pytest.mark.parametrize(("size", "T", "H", "W"), [(2, 8, 4, 8), (3, 10, 5, 7)], ids=["even", "uneven"])
def test_in_chunks(ranks, size, T, H, W, cut, along):
    ranks(size, _compare, T, H, W, (1, 2, 2), "dsp", FixedOverlap(3, along=along, cut=cut))


def _compare_computed_again(cut: str, along: str) -> None:
    set_overlap(dist.group.WORLD, FixedOverlap(2, along=along, cut=cut))
    config = VideoDiTConfig(layers=LAYERS, hidden=16, heads=2, conditioning_size=6, patch=(1, 2, 2))
    moved, _ = compare(config, 7, 5, 9, recompute=True)
    calls = {operation: calls for operation, (calls, _) in moved.by("operation").items()}
    assert calls["switch"] == calls["switch adjoint"]  # computed again, nothing moves again


@pytest.mark.parametrize(("cut", "along"), [("stages", "sharded"), ("ends", "space"), ("ends", "batch"), ("leave", "time")])
def test_recompute_in_chunks(ranks, cut, along):
    ranks(2, _compare_computed_again, cut, along)


def _with_a_frame_missing(missing_on: int) -> str:
    group = dist.group.WORLD
    model = VideoDiT(VideoDiTConfig(layers=1, hidden=16, heads=2, conditioning_size=6, patch=(2, 2, 2)))
    tokens = torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
    frames = 3 if group.rank() == missing_on else 4
    model(torch.randn(frames, 1, 3, 4, 4), torch.rand(4, 1), *tokens, group=group)
    return "taken"


def test_a_patch_may_be_unfilled_at_the_end_of_the_clip_only(ranks):
    assert ranks(2, _with_a_frame_missing, 1) == ["taken"] * 2
    with pytest.raises(AssertionError, match="give it 4 to 4 frames"):  # the other rank waits, and is ended
        ranks(2, _with_a_frame_missing, 0)


@pytest.mark.parametrize(("backend", "size", "T"), [("ulysses", 2, 5), ("ulysses", 3, 2), ("ring", 2, 4), ("ring", 3, 6)])
def test_other_backends_of_the_same_model(ranks, backend, size, T):
    ranks(size, _compare, T, 4, 6, (1, 2, 2), backend)


@pytest.mark.parametrize(("size", "T"), [(2, 5), (3, 2)])
def test_ulysses_in_chunks(ranks, size, T):
    ranks(size, _compare, T, 4, 6, (1, 2, 2), "ulysses", FixedOverlap(4))
