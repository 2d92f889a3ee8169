"""Batches: pure functions of sample positions and frames, alike on all ranks where they must be."""

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_dsp.data import Clips, Video, VideoBatches, draws

WHOLE_CLIP = ("timesteps", "conditioning", "conditioning_mask", "conditioning_drop")


def make_batches(**arguments):
    videos = [
        Video(name, np.random.default_rng(seed).integers(0, 256, (length, 4, 6, 3), dtype=np.uint8))
        for seed, (name, length) in enumerate([("bigbuckbunny.mp4", 21), ("bikes.mp4", 14), ("other.mp4", 30)])
    ]
    defaults = {
        "clips": Clips(videos, frames=7),
        "seed": 3,
        "patch_time": 2,
        "drop_probability": 0.5,
        "clean_frame_probability": 0.5,
        "conditioning_tokens": 4,
        "conditioning_width": 8,
    }
    return VideoBatches(**(defaults | arguments))


def assert_equal(batch, other, names):
    for name in names:
        assert torch.equal(getattr(batch, name), getattr(other, name)), name


def test_shapes_and_dtypes():
    batch = make_batches().batch([0, 1, 2], range(2, 5))
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    assert {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        "video": ([3, 3, 3, 4, 6], torch.float32),
        "noise": ([3, 3, 3, 4, 6], torch.float32),
        "timesteps": ([4, 3], torch.float32),
        "conditioning": ([3, 4, 8], torch.float32),
        "conditioning_mask": ([3, 4], torch.bool),
        "conditioning_drop": ([3], torch.bool),
    }


def test_pixels_become_minus_one_to_one():
    frames = np.zeros((2, 1, 2, 3), dtype=np.uint8)
    frames[:, :, 1] = 255
    batches = make_batches(clips=Clips([Video("black and white", frames)], frames=2))
    video = batches.batch([0], range(2)).video
    assert torch.equal(video[..., 0], torch.full((2, 1, 3, 1), -1.0))
    assert torch.equal(video[..., 1], torch.full((2, 1, 3, 1), 1.0))


@pytest.mark.parametrize("borders", [(0, 4, 7), (0, 3, 5, 7), (0, 1, 2, 3, 4, 5, 6, 7), (0, 7, 7)])
def test_ranks_hold_the_parts_of_one_batch(borders):
    batches = make_batches()
    whole = batches.batch([5, 6], range(7))
    parts = [batches.batch([5, 6], range(start, stop)) for start, stop in pairwise(borders)]
    assert torch.equal(torch.cat([part.video for part in parts]), whole.video)
    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    for part in parts:
        assert_equal(part, whole, WHOLE_CLIP)


def test_a_batch_is_a_pure_function_of_its_samples():
    batches = make_batches()
    batch = batches.batch([4, 40], range(7))
    torch.manual_seed(1)
    make_batches(seed=9).batch([1], range(7))
    batches.batch([100, 41], range(2))
    assert_equal(batches.batch([4, 40], range(7)), batch, [field.name for field in fields(batch)])
    assert_equal(make_batches().batch([4, 40], range(7)), batch, [field.name for field in fields(batch)])


def test_a_sample_does_not_depend_on_its_neighbours():
    batches = make_batches()
    alone, among = batches.batch([8], range(7)), batches.batch([2, 8], range(7))
    for name in ("video", "noise", "timesteps"):
        assert torch.equal(getattr(alone, name)[:, 0], getattr(among, name)[:, 1]), name
    for name in WHOLE_CLIP[1:]:
        assert torch.equal(getattr(alone, name)[0], getattr(among, name)[1]), name


def test_an_epoch_shows_every_clip_once_and_the_next_one_with_other_noise():
    batches = make_batches()
    size = len(batches.clips)
    epochs = [batches.batch(range(size * epoch, size * (epoch + 1)), range(7)) for epoch in range(2)]
    clips = {tuple(batches.clips.read(index, 0, 7).flatten().tolist()) for index in range(size)}
    for epoch in epochs:
        pixels = ((epoch.video + 1) * 127.5).round().to(torch.uint8)
        assert {tuple(pixels[:, column].flatten().tolist()) for column in range(size)} == clips
    noise = torch.cat([epoch.noise for epoch in epochs], dim=1).transpose(0, 1).flatten(1)
    assert len(noise.unique(dim=0)) == 2 * size
    assert not torch.equal(epochs[0].video, epochs[1].video), "the second epoch has another order"


def test_seeds_change_what_is_drawn():
    batch, other = (make_batches(seed=seed).batch([0, 1, 2, 3], range(7)) for seed in (0, 1))
    assert not torch.equal(batch.noise, other.noise)
    assert not torch.equal(batch.timesteps, other.timesteps)
    assert not torch.equal(batch.video, other.video)


def test_clean_frames_are_whole_token_frames_with_timestep_zero():
    batches = make_batches(clean_frame_probability=1.0)
    samples = range(60)
    timesteps = batches.batch(samples, range(1)).timesteps
    for sample, column in zip(samples, timesteps.T, strict=True):
        clean = draws.conditioned_frames(3, sample, 4, 1.0)
        assert 1 <= clean <= 3
        assert column[:clean].tolist() == [0] * clean
        assert torch.equal(column[clean:], torch.full((4 - clean,), draws.timestep(3, sample)))
    assert (make_batches(clean_frame_probability=0.0).batch(samples, range(1)).timesteps > 0).all()


@pytest.mark.parametrize(("patch_time", "token_frames"), [(1, 7), (2, 4), (3, 3), (7, 1), (8, 1)])
def test_token_frames_cover_the_clip(patch_time, token_frames):
    assert make_batches(patch_time=patch_time).batch([0], range(7)).timesteps.shape == (token_frames, 1)


def test_drops_follow_their_probability():
    assert make_batches(drop_probability=1.0).batch(range(20), range(1)).conditioning_drop.all()
    assert not make_batches(drop_probability=0.0).batch(range(20), range(1)).conditioning_drop.any()
    some = make_batches().batch(range(40), range(1)).conditioning_drop
    assert some.any()
    assert not some.all()


def test_conditioning_tells_files_and_positions_apart():
    batches = make_batches(conditioning_width=64)
    size = len(batches.clips)
    batch = batches.batch(range(size), range(1))
    windows = [batches.clips.windows[draws.sample_order(sample, size, 3)] for sample in range(size)]
    assert len(batch.conditioning.flatten(1).unique(dim=0)) == size
    for row, window in enumerate(windows):
        for other_row, other in enumerate(windows):
            same_file = torch.equal(batch.conditioning[row, 0], batch.conditioning[other_row, 0])
            same_place = torch.equal(batch.conditioning[row, 1], batch.conditioning[other_row, 1])
            assert same_file == (window.video == other.video)
            assert same_place == (window.start == other.start)
    square = batch.conditioning.square().mean(dim=-1)
    torch.testing.assert_close(square[:, 1], torch.ones(size))
    assert ((square[:, 0] > 0.5) & (square[:, 0] < 2)).all()


def test_masks_mark_the_valid_tokens_and_differ_between_files():
    batches = make_batches()
    batch = batches.batch(range(len(batches.clips)), range(1))
    counts = batch.conditioning_mask.sum(dim=1)
    assert counts.min() >= 2
    assert len(counts.unique()) > 1
    leading = torch.arange(4) < counts[:, None]
    assert torch.equal(batch.conditioning_mask, leading)
    assert torch.equal(batch.conditioning.ne(0).any(dim=-1), leading), "tokens are 0 exactly where the mask is False"


def test_conditioning_does_not_depend_on_which_other_files_there_are():
    alone = make_batches(clips=Clips(make_batches().clips.videos[1:2], frames=7))
    among = make_batches()
    index = among.clips.windows.index((1, 0))
    sample = next(sample for sample in range(100) if draws.sample_order(sample, len(among.clips), 3) == index)
    first = next(sample for sample in range(100) if draws.sample_order(sample, len(alone.clips), 3) == 0)
    assert_equal(alone.batch([first], range(1)), among.batch([sample], range(1)), ["conditioning", "conditioning_mask"])


def test_a_file_name_need_not_be_text():
    latin = Video(b"caf\xe9.mp4".decode(errors="surrogateescape"), np.zeros((7, 4, 6, 3), dtype=np.uint8))
    assert make_batches(clips=Clips([latin], frames=7)).batch([0], range(7)).conditioning_mask.any()


def test_a_batch_moves_to_another_device():
    batch = make_batches().batch([0], range(7)).to("meta")
    assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("patch_time", 0),
        ("drop_probability", 1.5),
        ("clean_frame_probability", -0.5),
        ("conditioning_tokens", 1),
        ("conditioning_width", 7),
    ],
)
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value} must be"):
        make_batches(**{argument: value})


def test_frames_outside_the_clip_and_empty_batches_are_refused():
    batches = make_batches()
    with pytest.raises(ValueError, match="frames 3 to 8 are not in a clip"):
        batches.batch([0], range(3, 8))
    with pytest.raises(ValueError, match="its step must be 1"):
        batches.batch([0], range(0, 6, 2))
    with pytest.raises(ValueError, match="no samples"):
        batches.batch([], range(7))
