"""The names of the files of a checkpoint, made and taken apart here alone.

M is a place on the pipe and tensor axes, DeepSpeed's rank of model parallelism: pipe rank x tensor degree + tensor rank. D is a
rank of data x sequence, T one of the tensor axis, P one of the pipe axis.

| name | class | written by |
|---|---|---|
| ``mp_rank_MM_model_states.pt``, in ZeRO 3 ``zero_pp_rank_D_mp_rank_MM_model_states.pt`` | `ModelFile` | DeepSpeed |
| ``zero_pp_rank_D_mp_rank_MM_optim_states.pt``, with ``bf16_`` before it for models in bf16 | `OptimizerFile` | DeepSpeed |
| ``layer_LL-model_TT-model_states.pt`` | `LayerFile` | DeepSpeed, with a pipeline |
| ``fp32.pt``, ``exp_avg.pt``, ``step.pt``, ... | `UniversalFile` | DeepSpeed's ``ds_to_universal`` |
| ``weights_tp_TT_pp_PP.safetensors``, ``ema_model_tp_TT_pp_PP.safetensors`` | `WeightsFile` | this package |
| ``rng_rank_RRRRR.safetensors`` | `random_numbers_file` | this package, on rank R of the job |
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT

STEP = "global_step"  # how the name of a checkpoint's folder begins
RANK_FILES = "*_states.pt"  # a pattern for the first three of the table
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+)|(?:-\w+)*)-model_states\.pt")
_WEIGHTS = re.compile(r"(weights|ema_model)_tp_(\d+)_pp_(\d+)\.safetensors")
_WEIGHTS_PREFIX = {WEIGHT: "weights", AVERAGE: "ema_model"}
_UNIVERSAL = re.compile(r"(fp32|exp_avg|exp_avg_sq|momentum_buffer|step|optimizer_state)\.pt")


class ModelFile(NamedTuple):
    """The model, and the optimizer of ZeRO 0. ``data_rank``: None where there is one file for all ranks of data x sequence."""

    model_rank: int
    data_rank: int | None = None

    @property
    def name(self) -> str:
        """The name of the file."""
        prefix = "" if self.data_rank is None else f"zero_pp_rank_{self.data_rank}_"
        return f"{prefix}mp_rank_{self.model_rank:02d}_model_states.pt"


class OptimizerFile(NamedTuple):
    """A rank's part of ZeRO's optimizer."""

    model_rank: int
    data_rank: int
    bf16: bool

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{'bf16_' * self.bf16}zero_pp_rank_{self.data_rank}_mp_rank_{self.model_rank:02d}_optim_states.pt"


class LayerFile(NamedTuple):
    """A layer of a pipeline. ``tensor_rank``: None where the name says other axes than that, or none."""

    layer: int
    tensor_rank: int | None

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"layer_{self.layer:02d}-model_{self.tensor_rank:02d}-model_states.pt"


class UniversalFile(NamedTuple):
    """A file of a universal checkpoint. ``content``: fp32 (the weight), step, optimizer_state, or a tensor of the optimizer."""

    content: str

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.content}.pt"


class WeightsFile(NamedTuple):
    """Whole weights of a place on the tensor and pipe axes, or their average: ``kind`` is `WEIGHT` or `AVERAGE`."""

    kind: str
    tensor_rank: int
    pipe_rank: int

    @property
    def name(self) -> str:
        """The name of the file: as Megatron names what the ranks of a model have."""
        return f"{_WEIGHTS_PREFIX[self.kind]}_tp_{self.tensor_rank:02d}_pp_{self.pipe_rank:02d}.safetensors"


def parse(name: str) -> ModelFile | OptimizerFile | LayerFile | UniversalFile | WeightsFile | None:
    """What a file is, by its name without a folder; None: it is none of these."""
    if match := _MODEL.fullmatch(name):
        return ModelFile(int(match[2]), _number(match[1]))
    if match := _OPTIMIZER.fullmatch(name):
        return OptimizerFile(int(match[3]), int(match[2]), match[1] is not None)
    if match := _LAYER.fullmatch(name):
        return LayerFile(int(match[1]), _number(match[2]))
    if match := _UNIVERSAL.fullmatch(name):
        return UniversalFile(match[1])
    if match := _WEIGHTS.fullmatch(name):
        kind = next(kind for kind, text in _WEIGHTS_PREFIX.items() if text == match[1])
        return WeightsFile(kind, int(match[2]), int(match[3]))
    return None


def model_files(folder: Path) -> list[Path]:
    """The models' files in ``folder``, sorted by their names."""
    return sorted(path for path in folder.iterdir() if isinstance(parse(path.name), ModelFile))


def random_numbers_file(rank: int) -> str:
    """The name of the file that has the states of a rank's random numbers."""
    return f"rng_rank_{rank:05d}.safetensors"


def step_folder(iteration: int) -> str:
    """The name of a checkpoint's folder, which DeepSpeed calls its tag."""
    return f"{STEP}{iteration}"


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)
