"""Named ranges in a profile: stages, and the beginnings and ends of switches."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def named(name: str) -> AbstractContextManager[object]:
    """A range of this name where a profiler is on (NVTX under ``torch.autograd.profiler.emit_nvtx``), else nothing."""
    if not name or torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(name)
