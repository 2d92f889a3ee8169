"""What DeepSpeed keeps and sends for the parameters of a rank, by arithmetic, after the code of DeepSpeed 0.19.8.

In all of it N is data x sequence: to DeepSpeed that is the data axis. Optimizer state is AdamW's, two numbers a weight in fp32.

| ZeRO | parameters | gradients | optimizer |
|---|---|---|---|
| 0 | whole | whole | whole |
| 1 | whole | whole | 1 / N, with a copy of the weights in fp32 |
| 2 | whole | 1 / N | as 1 |
| 3 | 1 / N, and those that are in use | 1 / N | as 1 |

A step sends an all-reduce of gradients (in stage 2 every micro-batch: DeepSpeed does not reduce-scatter there unless
"use_multi_rank_bucket_allreduce" is off), and in stages 1 and 2 an all-gather of weights. In stage 3 every micro-batch has
all-gathers of weights and a reduce-scatter of gradients. All-reduces are counted as rings: 2 (N - 1) / N of what is reduced.
A few numbers a step (norms, overflow flags, losses) are not counted.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megatron_dsp.config import Config
from megatron_dsp.dtypes import NAMES_OF, PRECISIONS
from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.collectives import ring_all_reduce_bytes
from megatron_dsp.training.deepspeed_engine import check_pipeline_config

_FP32 = 4  # bytes
_MOMENTS = 2  # of AdamW, a weight
_DTYPES = {name: dtype for short, dtype in PRECISIONS.items() for name in (short, NAMES_OF[dtype].name)}  # of ds_configs


class StateBytes(NamedTuple):
    """Bytes that a rank keeps from step to step. ``gradients`` and ``buckets`` are those of the end of backward.

    Attributes:
        parameters: the weights that the model computes with.
        gradients: of all micro-batches so far.
        optimizer: the optimizer's copy of the weights, where it has one, and its moments.
        buckets: in which gradients travel.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int


@dataclass(frozen=True)
class DeepSpeedCosts:
    """Memory and bytes of a ds_config's ZeRO stage and precision.

    Attributes:
        stage: of ZeRO.
        dtype: that the model computes in.
        accumulate: dtype in which gradients of micro-batches are summed up.
        communicate: dtype in which gradients are reduced.
        bucket: elements of a bucket of gradients.
        buckets: how many there are.
        keeps_both: whether gradients stay in ``dtype`` while they are summed up in ``accumulate``.
        persistent: ZeRO 3: parameters of at most so many elements stay whole.
        most_persistent: ZeRO 3: and no more elements than these together.
        reuse: ZeRO 3: parameters that are used again within so many elements stay whole until then.
        prefetch: ZeRO 3: so many elements are gathered ahead of their use, and stay as those.
        kept_beside: fp32 values a weight beside the weights themselves: AdamW's moments, and an average of the weights.
    """

    stage: int
    dtype: torch.dtype
    accumulate: torch.dtype
    communicate: torch.dtype
    bucket: int
    buckets: int
    keeps_both: bool
    persistent: int
    most_persistent: int
    reuse: int
    prefetch: int
    kept_beside: int

    @staticmethod
    def of(config: Config, *, ema: bool = False) -> DeepSpeedCosts:
        """Those of a ds_config; ``ema``: and of an `EMA`. Errors: UsageError for what cannot run, or is not known here."""
        raw, zero = config.deepspeed, config.deepspeed.get("zero_optimization", {})
        stage, pipelined = zero.get("stage", 0), config.mesh.pipe > 1
        dtype = torch.float32
        for section in ("bf16", "fp16"):
            if raw.get(section, {}).get("enabled", False):
                dtype = PRECISIONS[section]
        if pipelined:
            check_pipeline_config(config)
        _check(raw, stage, dtype)
        accumulate = _dtype(raw, "grad_accum_dtype", raw.get("data_types", {}).get("grad_accum_dtype"), dtype)
        # DeepSpeed has an optimizer of its own for this, without buckets.
        bf16_optimizer = (stage, dtype, accumulate) == (1, torch.bfloat16, torch.float32)
        buckets = 0 if stage == 0 or bf16_optimizer else 1
        if buckets and stage < 3 and zero.get("overlap_comm"):
            buckets = 1 if pipelined else 2
        return DeepSpeedCosts(
            stage=stage,
            dtype=dtype,
            accumulate=accumulate,
            communicate=_dtype(raw, "communication_data_type", raw.get("communication_data_type"), dtype),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=buckets + (buckets > 0 and pipelined),  # a pipeline's reduction makes one more
            keeps_both=bf16_optimizer and not raw["bf16"].get("immediate_grad_update", False),
            persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            most_persistent=int(zero.get("stage3_model_persistence_threshold", 2**63 - 1)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            kept_beside=_MOMENTS + ema,
        )

    def kept(self, parameters: list[int], ranks: int, micro_batches: int) -> StateBytes:
        """What a rank keeps of parameters with so many elements each, in the order in which they run; N = ``ranks``."""
        count, width = sum(parameters), self.dtype.itemsize
        if self.stage == 0:
            return StateBytes(count * width, count * self.accumulate.itemsize, self.kept_beside * count * _FP32, 0)
        if self.stage == 3:
            part = sum(-(-size // ranks) for size in parameters)
            whole = sum(self._persistent_sizes(parameters)) + sum(self._reused_sizes(parameters))
            return StateBytes(
                (part + whole) * width,
                part * self.accumulate.itemsize,
                (1 + self.kept_beside) * part * _FP32,
                self.bucket * self.communicate.itemsize,
            )
        flat = _aligned_size(count, ranks)
        optimizer = (1 + self.kept_beside) * flat // ranks * _FP32
        if self.stage == 2:
            gradients = self._partition(parameters, flat // ranks, micro_batches)
            return StateBytes(flat * width, gradients, optimizer, self._bucket_bytes(width))
        gradients = (flat if self.buckets == 0 else count) * self.accumulate.itemsize + self.keeps_both * count * width
        return StateBytes(flat * width, gradients, optimizer, self._bucket_bytes(self.accumulate.itemsize))

    def sent(self, parameters: list[int], ranks: int, micro_batches: int) -> int:
        """Bytes that a rank sends to others of its N = ``ranks`` in a step of so many micro-batches."""
        count, width = sum(parameters), self.dtype.itemsize
        reduced = ring_all_reduce_bytes(count * self.communicate.itemsize, ranks)
        if self.stage == 0:
            return reduced
        if self.stage < 3:
            gathered = (ranks - 1) * (_aligned_size(count, ranks) // ranks) * width
            return reduced * (micro_batches if self.stage == 2 else 1) + gathered
        parts = [-(-size // ranks) for size in parameters]
        persistent = [size > 0 for size in self._persistent_sizes(parameters)]
        reused = [size > 0 for size in self._reused_sizes(parameters)]
        gathered = sum(part for part, stays in zip(parts, persistent, strict=True) if stays) * width  # after the step
        for part, stays, once in zip(parts, persistent, reused, strict=True):
            gathered += 0 if stays else part * width * micro_batches * (1 if once else 2)  # forward, and backward
        return (ranks - 1) * (gathered + sum(parts) * self.communicate.itemsize * micro_batches)

    def _bucket_bytes(self, width: int) -> int:
        return self.buckets * self.bucket * width

    def _partition(self, parameters: list[int], part: int, micro_batches: int) -> int:
        """Bytes of gradients that the first rank keeps in stage 2, of which ``part`` elements are its own."""
        if self.accumulate != self.dtype:
            return part * self.accumulate.itemsize
        # Of whole parameters, and those of the last micro-batch beside the sum of the others.
        ends = itertools.accumulate(parameters)
        return next(end for end in ends if end >= min(part, sum(parameters))) * self.accumulate.itemsize * min(micro_batches, 2)

    def _persistent_sizes(self, parameters: list[int]) -> list[int]:
        """Of each parameter, the elements that stay whole throughout, 0 or all."""
        total, sizes = 0, []
        for size in parameters:
            stays = size <= self.persistent and total + size <= self.most_persistent
            total += size if stays else 0
            sizes.append(size if stays else 0)
        return sizes

    def _reused_sizes(self, parameters: list[int]) -> list[int]:
        """Of each other parameter, the elements that stay whole from forward to backward, 0 or all."""
        after, sizes = 0, []  # backward comes back to a parameter after twice what is after it in forward
        for size, persistent in zip(reversed(parameters), reversed(self._persistent_sizes(parameters)), strict=True):
            stays = not persistent and (2 * after < self.reuse or after < self.prefetch)
            sizes.append(size if stays else 0)
            after += size
        return sizes[::-1]


def _aligned_size(count: int, ranks: int) -> int:
    """Elements of a flat buffer that is cut into equal parts; each begins at a multiple of two elements."""
    return math.ceil(count / (2 * ranks)) * 2 * ranks


def _dtype(raw: dict[str, Any], key: str, name: str | None, default: torch.dtype) -> torch.dtype:
    if name is None:
        return default
    if name not in _DTYPES:
        raise UsageError(f"{key}={name!r}: known are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _check(raw: dict[str, Any], stage: int, dtype: torch.dtype) -> None:
    """Refuse what this arithmetic does not know."""
    if stage == 0 and dtype != torch.float32:
        raise UsageError(f"zero_optimization.stage=0 with {dtype}: a dry run knows fp32 there alone; use stage 1")
    for key in ("offload_optimizer", "offload_param"):
        if raw.get("zero_optimization", {}).get(key, {}).get("device", "none") != "none":
            raise UsageError(f"zero_optimization.{key}: a dry run knows no offloading; remove it")
    optimizer = raw.get("optimizer", {}).get("type", "AdamW")
    if "adam" not in optimizer.lower():
        raise UsageError(f"optimizer.type={optimizer!r}: a dry run knows the memory of Adam and AdamW alone; use one of them")
