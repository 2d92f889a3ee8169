"""The command lines in tools/."""

from __future__ import annotations

import runpy
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
prepare_videos = runpy.run_path(str(ROOT / "tools" / "prepare_videos.py"))["main"]


@pytest.fixture
def folder(tmp_path):
    """A folder with a video of 3 frames, and one that is none."""
    (tmp_path / "videos").mkdir()
    with av.open(str(tmp_path / "videos" / "tiny.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0"
        for frame in np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "videos" / "notes.mp4").write_text("not a video")
    return tmp_path / "videos"


def test_prepare_videos_decodes_into_the_cache(folder, tmp_path, capsys, caplog):
    arguments = ["--data-path", folder, "--data-cache-path", tmp_path / "cache", "--img-h", 12, "--img-w", 16]
    assert prepare_videos([str(argument) for argument in arguments]) == 0
    (cached,) = (tmp_path / "cache").iterdir()
    assert np.load(cached).shape == (3, 12, 16, 3)
    output = capsys.readouterr().out
    assert "tiny.mkv" in output
    assert "1 videos, 3 frames of 12x16 pixels" in output
    assert "notes.mp4 is not a readable video" in caplog.text


def test_prepare_videos_refuses_in_one_line(folder, tmp_path, capsys):
    arguments = ["--data-path", str(folder), "--data-cache-path", str(tmp_path / "cache"), "--bad-files", "refuse"]
    assert prepare_videos(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "notes.mp4" in error
    assert error.count("\n") == 1
