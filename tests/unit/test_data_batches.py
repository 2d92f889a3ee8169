"""Batches: pure functions of sample positions and frames, alike on all ranks where they must be."""

import math
import re
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_dsp import shard_range
from megatron_dsp.data import Clips, ClipSamples, Shape, Video, VideoBatch, VideoBatches, draws

WHOLE_CLIP = ("timesteps", "conditioning", "conditioning_mask", "conditioning_drop")


VIDEOS = [
    Video(name, np.random.default_rng(seed).integers(0, 256, (length, 4, 6, 3), dtype=np.uint8))
    for seed, (name, length) in enumerate([("bigbuckbunny.mp4", 21), ("bikes.mp4", 14), ("other.mp4", 30)])
]


def clip_samples(videos=VIDEOS, frames=7, tokens=4, width=8):
    return ClipSamples(Clips(videos, frames=frames), conditioning_tokens=tokens, conditioning_width=width)


def make_batches(**arguments):
    defaults = {
        "samples": clip_samples(),
        "global_batch_size": 4,
        "seed": 3,
        "patch": (2, 2, 2),
        "drop_probability": 0.5,
        "clean_frame_probability": 0.5,
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
    batches = make_batches(samples=clip_samples([Video("black and white", frames)], frames=2))
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
    size = len(batches.samples)
    epochs = [batches.batch(range(size * epoch, size * (epoch + 1)), range(7)) for epoch in range(2)]
    clips = {tuple(batches.samples.clips.read(index, 0, 7).flatten().tolist()) for index in range(size)}
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
    assert make_batches(patch=(patch_time, 1, 1)).batch([0], range(7)).timesteps.shape == (token_frames, 1)


def test_drops_follow_their_probability():
    assert make_batches(drop_probability=1.0).batch(range(20), range(1)).conditioning_drop.all()
    assert not make_batches(drop_probability=0.0).batch(range(20), range(1)).conditioning_drop.any()
    some = make_batches().batch(range(40), range(1)).conditioning_drop
    assert some.any()
    assert not some.all()


def test_conditioning_tells_files_and_positions_apart():
    batches = make_batches(samples=clip_samples(width=64))
    size = len(batches.samples)
    batch = batches.batch(range(size), range(1))
    order = draws.SampleOrder(size, seed=3)
    windows = [batches.samples.clips.windows[order[sample]] for sample in range(size)]
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
    batch = batches.batch(range(len(batches.samples)), range(1))
    counts = batch.conditioning_mask.sum(dim=1)
    assert counts.min() >= 2
    assert len(counts.unique()) > 1
    leading = torch.arange(4) < counts[:, None]
    assert torch.equal(batch.conditioning_mask, leading)
    assert torch.equal(batch.conditioning.ne(0).any(dim=-1), leading), "tokens are 0 exactly where the mask is False"


def test_conditioning_does_not_depend_on_which_other_files_there_are():
    alone, among = clip_samples(VIDEOS[1:2]), clip_samples()
    index = among.clips.windows.index((1, 0))
    for part, other in zip(alone.conditioning(0), among.conditioning(index), strict=True):
        assert torch.equal(part, other)


def test_a_file_name_need_not_be_text():
    latin = Video(b"caf\xe9.mp4".decode(errors="surrogateescape"), np.zeros((7, 4, 6, 3), dtype=np.uint8))
    assert make_batches(samples=clip_samples([latin])).batch([0], range(7)).conditioning_mask.any()


def test_a_batch_moves_to_another_device():
    batch = make_batches().batch([0], range(7)).to("meta")
    assert {getattr(batch, field.name).device.type for field in fields(batch)} == {"meta"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("patch", (0, 1, 1)),
        ("patch", (1, 1)),
        ("drop_probability", 1.5),
        ("clean_frame_probability", -0.5),
        ("global_batch_size", 0),
        ("timestep_base_tokens", 0),
    ],
)
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value} must be")):
        make_batches(**{argument: value})


@pytest.mark.parametrize(("argument", "value"), [("tokens", 1), ("width", 7)])
def test_arguments_of_clips_are_checked(argument, value):
    with pytest.raises(ValueError, match=f"conditioning_{argument}={value} must be"):
        clip_samples(**{argument: value})


def test_frames_outside_the_clip_and_empty_batches_are_refused():
    batches = make_batches()
    with pytest.raises(ValueError, match="frames 3 to 8 are not in a clip"):
        batches.batch([0], range(3, 8))
    with pytest.raises(ValueError, match="its step must be 1"):
        batches.batch([0], range(0, 6, 2))
    with pytest.raises(ValueError, match="no samples"):
        batches.batch([], range(7))


def test_values_do_not_change_between_releases():
    # A run that is resumed with a newer release must see the same samples, noise and conditioning.
    batch = make_batches().batch([20, 21], range(2, 4))
    torch.testing.assert_close(batch.video[0, :, 0, 0, :2], torch.tensor([[0.1686275, 0.6392157], [0.6156863, 0.8666667]]))
    torch.testing.assert_close(batch.noise[1, :, 2, 3, 4:], torch.tensor([[-0.7594761, -0.1800945], [-1.0107239, 0.9373128]]))
    torch.testing.assert_close(batch.timesteps, torch.tensor([[0.0, 0.3108203]] + [[0.6898406, 0.3108203]] * 3))
    torch.testing.assert_close(batch.conditioning[:, :2, 3], torch.tensor([[-2.2058103, 0.0197983], [-0.5944108, 0.0296963]]))


class RandomSamples:
    """Samples of any shapes, random; it notes which frames were read."""

    conditioning_tokens, conditioning_width = 2, 3

    def __init__(self, *shapes):
        self.shapes, self.asked = [Shape(*shape) for shape in shapes], []

    def __len__(self):
        return len(self.shapes)

    def shape(self, index):
        return self.shapes[index]

    def read(self, index, start, stop):
        self.asked.append((index, start, stop))
        generator = torch.Generator().manual_seed(index)
        return torch.randn(self.shapes[index], generator=generator).bfloat16()[start:stop]

    def conditioning(self, index):
        return torch.full((2, 3), float(index)), torch.tensor([True, index % 2 == 0])


MIXED = [(5, 4, 2, 4)] * 5 + [(1, 4, 3, 3)] * 6 + [(4, 4, 2, 2)]


@pytest.mark.parametrize("ranks", range(1, 6))
@pytest.mark.parametrize("patch_time", [1, 2, 3])
def test_ranks_together_hold_the_whole_batch_of_any_bucket(ranks, patch_time):
    batches = make_batches(samples=RandomSamples(*MIXED), patch=(patch_time, 1, 1))
    seen = set()
    for step in range(5):
        positions = range(4 * step + 1, 4 * step + 4)
        shape = batches.shape(positions)
        seen.add(shape)
        whole = batches.batch(positions, range(shape.frames))
        assert whole.video.shape == whole.noise.shape == (shape.frames, 3, *shape[1:])
        token_frames = math.ceil(shape.frames / patch_time)
        parts = []
        for rank in range(ranks):
            start, stop = shard_range(token_frames, ranks, rank)
            # As callers have it: behind the last frame, stop may even be less than start.
            parts.append(batches.batch(positions, range(start * patch_time, min(stop * patch_time, shape.frames))))
            assert_equal(parts[-1], whole, WHOLE_CLIP)
        assert torch.equal(torch.cat([part.video for part in parts]), whole.video)
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert whole.timesteps.shape == (token_frames, 3)
    assert len(seen) == 3


def test_a_rank_without_frames_reads_nothing_and_knows_the_rest():
    samples = RandomSamples((1, 4, 3, 5))
    batches = make_batches(samples=samples)
    part = batches.batch([0, 1], range(1, 1))
    assert samples.asked == []
    assert part.video.shape == part.noise.shape == (0, 2, 4, 3, 5)
    assert_equal(part, batches.batch([0, 1], range(1)), WHOLE_CLIP)
    assert samples.asked == [(0, 0, 1)] * 2


def test_samples_of_two_buckets_do_not_make_a_batch():
    batches = make_batches(samples=RandomSamples(*MIXED))
    shapes = [batches.shape([4 * step]) for step in range(5)]
    step = next(step for step in range(4) if shapes[step] != shapes[step + 1])
    positions = [4 * step + 3, 4 * step + 4]
    with pytest.raises(ValueError, match=re.escape(f"have shapes {shapes[step]} and {shapes[step + 1]}, which do not")):
        batches.batch(positions, range(1))
    with pytest.raises(ValueError, match="no samples"):
        batches.shape([])


def test_a_run_resumes_at_any_sample():
    def stream(start, stop):
        batches = make_batches(samples=RandomSamples(*MIXED))
        return [batches.batch([position], range(1)) for position in range(start, stop)]

    names = [field.name for field in fields(VideoBatch)]
    uninterrupted = stream(0, 50)
    for start in (7, 24, 33):
        for batch, other in zip(stream(start, 50), uninterrupted[start:], strict=True):
            assert_equal(batch, other, names)


def test_timesteps_are_shifted_by_the_tokens_of_the_bucket():
    settings = {"samples": RandomSamples(*MIXED), "patch": (2, 2, 2), "clean_frame_probability": 1.0}
    plain, other = (make_batches(**settings, timestep_base_tokens=base) for base in (None, 6))
    expected = {5: 3 * 1 * 2, 1: 1 * 2 * 2, 4: 2 * 1 * 1}  # tokens by frames
    for position in range(40):
        frames = plain.shape([position]).frames
        before, after = (batches.batch([position], range(0)).timesteps for batches in (plain, other))
        assert torch.equal(after == 0, before == 0), "clean frames stay clean"
        timestep = draws.shift_timestep(draws.timestep(3, position), expected[frames], 6)
        assert torch.equal(after[after > 0], torch.full_like(after[after > 0], timestep))
        if frames == 5:
            assert torch.equal(after, before)
        else:
            assert (after <= before).all()
            assert not torch.equal(after, before)
