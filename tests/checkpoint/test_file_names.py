"""Names of a checkpoint's files: those that DeepSpeed 0.19.8 gives, there and back."""

from __future__ import annotations

import pytest

from megatron_dsp.checkpoint.file_names import LayerFile, ModelFile, OptimizerFile, UniversalFile, WeightsFile, parse
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT

_NAMES = {
    "mp_rank_03_model_states.pt": ModelFile(3),
    "zero_pp_rank_12_mp_rank_100_model_states.pt": ModelFile(100, 12),
    "zero_pp_rank_1_mp_rank_02_optim_states.pt": OptimizerFile(2, 1, bf16=False),
    "bf16_zero_pp_rank_10_mp_rank_00_optim_states.pt": OptimizerFile(0, 10, bf16=True),
    "layer_07-model_01-model_states.pt": LayerFile(7, 1),
    "exp_avg_sq.pt": UniversalFile("exp_avg_sq"),
    "weights_tp_01_pp_02.safetensors": WeightsFile(WEIGHT, 1, 2),
    "ema_model_tp_00_pp_11.safetensors": WeightsFile(AVERAGE, 0, 11),
}


@pytest.mark.parametrize(("name", "file"), _NAMES.items())
def test_names_there_and_back(name, file):
    assert parse(name) == file
    assert file.name == name


@pytest.mark.parametrize("name", ["layer_07-model_states.pt", "layer_07-model_01-expert_02-model_states.pt"])
def test_layers_by_other_axes_have_no_tensor_rank(name):
    assert parse(name) == LayerFile(7, None)


@pytest.mark.parametrize("name", ["model_states.pt", "amp_rank_00_model_states.pt", "weights_tp_00.safetensors", "step.pt.tmp"])
def test_other_names_are_of_no_kind(name):
    assert parse(name) is None
