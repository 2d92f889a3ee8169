"""Formats of checkpoints: each is read into a `Source`, whole over all axes, and written from one (docs/converting.md).

A new format is a module with a function for each, and a line in the table here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_dsp.checkpoint.formats import deepspeed, deepspeed_universal, safetensors, torch_dcp
from megatron_dsp.checkpoint.formats.source import Source, Target


@dataclass(frozen=True)
class Format:
    """How a format is told from others, read and written.

    Attributes:
        recognises: whether a folder is of it, by the names of files alone.
        load: reads a folder. Errors: UsageError where it is damaged, or is not what the format is.
        save: writes into an empty folder. Errors: UsageError, before it writes, for a target that the format does not have.
        takes: what it has a use for in a `Target`, beside the dtype.
    """

    recognises: Callable[[Path], bool]
    load: Callable[[Path], Source]
    save: Callable[[Source, Path, Target], None]
    takes: tuple[str, ...]


# In the order in which a folder is looked at: those with the more telling names first.
FORMATS = {
    "deepspeed_universal": Format(
        deepspeed_universal.recognises, deepspeed_universal.load, deepspeed_universal.save, ("pipe",)
    ),
    "deepspeed": Format(deepspeed.recognises, deepspeed.load, deepspeed.save, ("tensor", "pipe", "data", "zero_stage")),
    "torch_dcp": Format(torch_dcp.recognises, torch_dcp.load, torch_dcp.save, ()),
    "safetensors": Format(safetensors.recognises, safetensors.load, safetensors.save, ("max_shard_size",)),
}
