"""Which device a job takes for its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from work import missing

import megatron_dsp as dsp

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


def _started_without_a_backend() -> str:
    dist.destroy_process_group()
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    return dsp.Mesh.from_megatron(SimpleNamespace(tp=world, cp=world, dp=world, pp=world)).device.type


def test_the_device_is_the_gpu_where_torch_chose_the_backend(ranks):
    assert torch.cuda.is_available()
    assert ranks(1, _started_without_a_backend) == ["cuda"]
