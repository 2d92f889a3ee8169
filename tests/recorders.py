"""A recorder for the CPU, which has no graphs: what it records is computed again in each replay, into the same memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_dsp.training.graph_capture import Tensors, discount


class Repeats:
    """Counts what it ``recorded`` and ``replayed``."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def warm_up(self, run: Callable[[], object]) -> None:
        """Once."""
        run()

    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """Nothing moves in a replay that is not counted by whoever replays."""
        self.recorded += 1
        results = run()

        def replay() -> None:
            self.replayed += 1
            with discount(), torch.enable_grad():
                found = run()
            for memory, result in zip(results, found, strict=True):
                if memory is not None:
                    memory.copy_(result)

        return results, replay
