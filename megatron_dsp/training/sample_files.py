"""Files of sampled clips: a picture where they are pixels, safetensors where they are latents for a decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor


def write(path: Path, clips: dict[str, Tensor]) -> Path:
    """Write clips [T, B, C, H, W], by label, in ``path`` with a suffix of their kind; returns the file's path.

    Three channels are pixels in -1 .. 1, and become a picture. Others are latents: each is a tensor ``LABEL`` in its own dims.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if next(iter(clips.values())).shape[2] == 3:
        path = path.with_suffix(".png")
        _picture(clips).save(path)
    else:
        path = path.with_suffix(".safetensors")
        save_file({label.replace(" ", "_"): clip.cpu().contiguous() for label, clip in clips.items()}, path)
    return path


def _picture(clips: dict[str, Tensor], scale: int = 3) -> Image.Image:
    """One row of frames for each sample and each kind of clip, enlarged ``scale`` times."""
    T, B, _, H, W = next(iter(clips.values())).shape
    margin = 8 + 6 * max(map(len, clips))
    picture = Image.new("RGB", (margin + T * W * scale, B * len(clips) * H * scale), "white")
    draw = ImageDraw.Draw(picture)
    for b in range(B):
        for row, (label, clip) in enumerate(clips.items()):
            top = (b * len(clips) + row) * H * scale
            draw.text((4, top + 4), label, fill="black")
            pixels = ((clip[:, b] + 1) * 127.5).clamp(0, 255).to("cpu", torch.uint8)
            strip = pixels.permute(2, 0, 3, 1).reshape(H, T * W, 3).contiguous()
            picture.paste(
                Image.fromarray(strip.numpy()).resize((T * W * scale, H * scale), Image.Resampling.NEAREST), (margin, top)
            )
    return picture
