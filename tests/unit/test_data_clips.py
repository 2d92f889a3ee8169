"""Windows over videos: which there are, what a read touches, and that held-out clips are held out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.data import Clips, DataError, Video


class RecordedFrames(np.ndarray):
    """Frames that remember which of them were asked for."""

    def __getitem__(self, key):
        self.asked.append(key)
        return np.asarray(self)[key]


def video(length, name="video", height=2, width=3):
    frames = np.arange(length * height * width * 3).astype(np.uint8)
    return Video(name, frames.reshape(length, height, width, 3))


def test_windows_start_every_step_frames_and_end_inside():
    clips = Clips([video(10), video(7)], frames=4, step=3)
    assert clips.windows == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 3)]
    assert len(clips) == 5
    assert Clips([video(10)], frames=4).windows == [(0, 0), (0, 4)], "without a step, clips share no frame"


def test_a_read_is_a_slice_of_the_window():
    source = video(10)
    clips = Clips([source], frames=4, step=3)
    whole = clips.read(1, 0, 4)
    assert whole.dtype == torch.uint8
    assert whole.is_contiguous()
    np.testing.assert_array_equal(whole.numpy(), source.frames[3:7].transpose(0, 3, 1, 2))
    assert torch.equal(clips.read(1, 1, 3), whole[1:3])
    assert clips.read(1, 2, 2).shape == (0, 3, 2, 3)


def test_only_the_frames_of_the_rank_are_read():
    frames = video(20).frames.view(RecordedFrames)
    frames.asked = []
    Clips([Video("recorded", frames)], frames=8, step=5).read(2, 3, 5)
    assert frames.asked == [slice(13, 15)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5)])
def test_frames_outside_the_clip_are_refused(start, stop):
    with pytest.raises(ValueError, match=f"frames {start} to {stop} are not in a clip"):
        Clips([video(10)], frames=4).read(0, start, stop)


def test_short_videos_are_named_and_left_out(caplog):
    clips = Clips([video(3, "short"), video(4, "long")], frames=4)
    assert [source.name for source in clips.videos] == ["long"]
    assert [message for message in caplog.messages if "short" in message] == caplog.messages != []
    with pytest.raises(DataError, match="frames=5: the longest of 2 has 4 frames"):
        Clips([video(3), video(4)], frames=5)


def test_arguments_are_checked():
    with pytest.raises(DataError, match="frames=0"):
        Clips([video(4)], frames=0)
    with pytest.raises(DataError, match="step=0"):
        Clips([video(4)], frames=2, step=0)
    for fraction in (0.0, 1.0, -1):
        with pytest.raises(DataError, match=f"fraction={fraction}"):
            Clips([video(9)], frames=2).split(fraction)
    with pytest.raises(DataError, match="leaves none for training"):
        Clips([video(4)], frames=4).split(0.1)


def frames_of(clips):
    return {(source, start + offset) for source, start in clips.windows for offset in range(clips.frames)}


@given(
    lengths=st.lists(st.integers(4, 40), min_size=1, max_size=5),
    frames=st.integers(1, 4),
    step=st.integers(1, 6),
    fraction=st.floats(0.01, 0.6),
)
def test_held_out_clips_share_no_frame_with_training(lengths, frames, step, fraction):
    clips = Clips([video(length, height=1, width=1) for length in lengths], frames=frames, step=step)
    held_out = math.ceil(fraction * len(clips))
    try:
        training, validation = clips.split(fraction)
    except DataError:
        assert len(clips) <= held_out + len(lengths) * math.ceil(frames / step), "there was enough to train on"
        return
    assert len(validation) == held_out
    assert not frames_of(training) & frames_of(validation)
    border = frames_of(validation)
    for window in set(clips.windows) - set(training.windows) - set(validation.windows):
        assert any((window.video, window.start + offset) in border for offset in range(frames)), "dropped without need"
    again = clips.split(fraction)
    assert (again[0].windows, again[1].windows) == (training.windows, validation.windows)


def test_every_video_gives_its_part_to_validation():
    training, validation = Clips([video(20), video(20)], frames=2).split(0.2)
    assert [source for source, _ in validation.windows] == [0, 0, 1, 1]
    assert len(training) == 16
