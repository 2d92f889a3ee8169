"""Words for what a checkpoint holds in any format: kinds of tensors, and how far its training had come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WEIGHT = "weight"  # the kinds of tensors: fp32 weights, their average, and the optimizer's (exp_avg, exp_avg_sq)
AVERAGE = "ema"


@dataclass(frozen=True)
class Training:
    """How far a training had come; all of it can be written as JSON.

    Attributes:
        iteration: optimizer steps, those that fp16 skipped included.
        consumed_samples: of the data.
        skipped_steps: iterations in which fp16 overflowed.
        step: the optimizer's own count, for its bias correction.
        lr: the learning rate.
        options: the optimizer's other ones (betas, eps, weight decay), where a format keeps them.
        schedule: the state of the learning rate's schedule, if there is one.
        loss_scale: fp16's; None without.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    step: int | None = None
    lr: float | None = None
    schedule: Mapping[str, Any] | None = None
    loss_scale: Mapping[str, Any] | None = None
    options: Mapping[str, Any] | None = None

    @property
    def progress(self) -> dict[str, int]:
        """What a manifest says of it."""
        return {"iteration": self.iteration, "consumed_samples": self.consumed_samples}
