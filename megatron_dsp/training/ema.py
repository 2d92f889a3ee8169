"""An exponential moving average of the weights, in fp32 and in shards, as the optimizer has the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.training.master_weights import FlatReader, MasterWeights

_CHUNK = 2**22  # elements that an exchange copies aside


class EMA:
    """``average = decay * average + (1 - decay) * weights`` after each optimizer step, from the weights at its making on.

    Takes the memory of one more fp32 copy of what this rank's optimizer has of the weights: a shard with ZeRO, all of them in
    stage 0. Call `update` after each ``engine.step()``, or ``engine.train_batch(...)``, that changed the weights:

        if engine.was_step_applied():  # not between micro-batches, nor where fp16 overflowed
            ema.update()

    Frozen parameters and buffers are their own average.

    Args:
        engine: of ``dsp.deepspeed_initialize``.
        mesh: its mesh.
        decay: at least 0, below 1.

    Errors: UsageError for another ``decay``, and where the engine's weights are on NVMe or not in fp32 anywhere.
    """

    def __init__(self, engine: Any, mesh: Mesh, decay: float):
        if not 0 <= decay < 1:
            raise UsageError(f"EMA decay {decay}: must be at least 0 and below 1, such as 0.9999")
        self.decay = decay
        self._weights = MasterWeights(engine, mesh)
        tensors = self._weights.tensors()
        for tensor in tensors:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise UsageError(
                    f"EMA needs fp32 weights in contiguous memory, but the optimizer's are {tensor.dtype}, "
                    f"{list(tensor.shape)} with strides {list(tensor.stride())}; train in fp32, or in bf16 or fp16 with fp32 "
                    "master weights"
                )
        self._average = [tensor.clone() for tensor in tensors]
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the average. Waits for nothing and sends nothing."""
        self._check_not_applied("update")
        torch._foreach_lerp_(self._average, self._weights.tensors(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine's model computes with the average inside, and with its own weights again afterwards, bit by bit.

        Average and weights change places, without memory for another copy. Collective over data x sequence, at both ends.
        """
        self._check_not_applied("applied")
        self._exchange()
        self._is_applied = True
        try:
            yield
        finally:
            self._is_applied = False
            self._exchange()

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the average as `MasterWeights.save` does; collective over data x sequence."""
        self._check_not_applied("save")
        self._weights.save(path, self._average, {**metadata, "decay": repr(self.decay)})

    def load(self, source: FlatReader) -> None:
        """Take the average from ``source``, of this model. The decay stays this one's."""
        self._check_not_applied("load")
        self._weights.load(source, self._average)

    def _check_not_applied(self, call: str) -> None:
        if self._is_applied:
            raise UsageError(f"EMA.{call} inside EMA.applied, where the weights are the average; call it after that block")

    @torch.no_grad()
    def _exchange(self) -> None:
        for weights, average in zip(self._weights.tensors(), self._average, strict=True):
            for one, other in zip(weights.view(-1).split(_CHUNK), average.view(-1).split(_CHUNK), strict=True):
                copy = one.clone()
                one.copy_(other)
                other.copy_(copy)
        self._weights.publish()
