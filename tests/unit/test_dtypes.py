"""The table of dtypes, against the programs whose names it has."""

from __future__ import annotations

import io
import json
import pickletools
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_dsp.dtypes import DTYPES, DtypeNames


@pytest.mark.parametrize("names", DTYPES, ids=lambda names: names.name)
def test_names_are_those_of_other_programs(names: DtypeNames) -> None:
    x = torch.ones(1).to(names.dtype)
    assert names.dtype == getattr(torch, names.name)

    header = safetensors.torch.save({"x": x})
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["x"]["dtype"] == names.safetensors

    file = io.BytesIO()
    torch.save(x, file)
    pickle = zipfile.ZipFile(file).read("archive/data.pkl")
    assert f"torch {names.storage.__name__}" in [argument for _, argument, _ in pickletools.genops(pickle)]

    if names.npy is None:
        with pytest.raises(TypeError):
            x.numpy()
    else:
        assert np.lib.format.dtype_to_descr(x.numpy().dtype) == names.npy
