"""A network whose speed a test sets."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard.exchange import bytes_to_others
from megatron_dsp.reshard.transport.move import End, Move
from megatron_dsp.reshard.transport.torch_transport import TorchTransport


class Network(TorchTransport):
    """Sends so many bytes a second, one switch after another; beside compute, or only while somebody waits."""

    def __init__(self, group: dist.ProcessGroup, bandwidth: float, beside: bool = True):
        super().__init__(group)
        self.bandwidth, self.beside = bandwidth, beside
        self._free = 0.0

    def begin(self, moves: list[Move], label: Any, **how: Any) -> End:
        end = super().begin(moves, label, **how)
        seconds = bytes_to_others(moves, self._rank) / self.bandwidth
        self._free = arrives = max(self._free, time.perf_counter()) + seconds

        def finish() -> list[Tensor]:
            time.sleep(max(0.0, arrives - time.perf_counter()) if self.beside else seconds)
            return end()

        return finish
