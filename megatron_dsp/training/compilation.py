"""Stages compiled by torch.compile, switches between them not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def compile_stages(stages: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Let torch.compile run the modules of stages from now on, with sizes as constants of their graphs.

    Modules of one class share their graphs where shapes and settings agree: a model of many layers compiles each kind of layer
    once a shape. What moves shards stands between the modules, outside of graphs, so an overlap works as without. Parameters
    keep their names.

    Every shape compiles its own graphs, forward and backward: bring clips of few shapes. torch's limit of graphs for one
    function (``torch._dynamo.config.recompile_limit``, 8) is raised to that for all together, beyond which torch goes on
    without compiling.

    Args:
        stages: `VideoDiT.blocks()`, or the modules of your own that stages run.
        backend: of torch.compile.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, limits.accumulated_recompile_limit)
    for stage in stages:
        stage.compile(dynamic=False, backend=backend)
