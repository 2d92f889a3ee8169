"""Decode videos into the cache before a job starts, so that its ranks find them decoded.

    python tools/prepare_videos.py --data-path /data/videos --data-cache-path /scratch/cache --img-h 256 --img-w 256

The flags are those of pretrain_scripts/pretrain_video.py: give the job the same values. What is in the cache already is
not decoded again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_dsp.data import DataError, open_videos


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Decode videos into the cache before a job starts.")
    add = parser.add_argument
    add("--data-path", type=Path, help="folder of videos, or one video; default: three small clips")
    add("--data-cache-path", type=Path, default=Path("data/cache"), help="folder for decoded frames; default: data/cache")
    add("--img-h", type=int, default=32, help="height of a frame, pixels; default: 32")
    add("--img-w", type=int, default=48, help="width of a frame, pixels; default: 48")
    add("--bad-files", choices=["skip", "refuse"], default="skip", help="what to do with files that do not decode")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")  # files that are skipped are named by a warning
    console = Console()
    try:
        with console.status(f"decoding {given.data_path or 'the default clips'} into {given.data_cache_path} ..."):
            videos = open_videos(
                given.data_path,
                height=given.img_h,
                width=given.img_w,
                cache=given.data_cache_path,
                on_bad_file=given.bad_files,
            )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    table = Table("video", "frames")
    for video in videos:
        table.add_row(video.name, str(len(video.frames)))
    console.print(table)
    print(f"{len(videos)} videos, {sum(len(video.frames) for video in videos)} frames of {given.img_h}x{given.img_w} pixels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
