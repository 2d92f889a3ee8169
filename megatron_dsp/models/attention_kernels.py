"""Softmax attention, and whose kernel computes it.

On GPUs it is that of flash-attn (https://github.com/Dao-AILab/flash-attention) where that is installed: it skips keys that a
mask hides, where torch's fused kernels take a mask for a bias. In a compiled graph it is always torch's. Torch has several, and
chooses by fixed rules, whatever the lengths; for short sequences the fastest is measured here.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# Its CUDA extension tells: without it the package does not load.
HAS_FLASH = importlib.util.find_spec("flash_attn_2_cuda") is not None
if HAS_FLASH:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

# Kernels have blocks for each sample along a dim of the grid that has so many at most (CUDA C++ Programming Guide, compute
# capabilities), and some count a tensor's elements in int32.
_LARGEST_BATCH = 65_535
_MOST_ELEMENTS = 2**31 - 1
_SHORT = 256  # queries or keys: whose kernel is fastest is measured up to here
_REPETITIONS = 5
_HEAD_START = 20_000_000  # cycles that the GPU sleeps, about 10 ms, while the host launches what is timed
_CLEARLY = 0.95  # of the time of torch's own choice: what is not faster than that stays torch's

# The fused kernels. The other one, which keeps all scores for backward, is left to torch.
_CAN_USE: dict[SDPBackend, Callable[[SDPAParams], bool]] = {
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
}


class _Kind(NamedTuple):
    """All that the time of a call depends on."""

    device: torch.device
    dtype: torch.dtype
    layouts: tuple[tuple[int, ...], ...]  # shape and strides of query, key and value
    masked: bool
    needs_gradient: tuple[bool, ...]  # query, key and value


# The backend that was found for a kind of call; None: torch's own choice. It stays: a device does not change.
_fastest: dict[_Kind, SDPBackend | None] = {}


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of strided tensors.

    On CUDA a batch that is too large for a kernel is attended in parts. Of short sequences, the first call of a kind (shapes,
    dtype, mask, gradients) waits for the device while backends are timed; under a compiler, and while a CUDA graph is captured,
    nothing is timed, and what was found before is taken, or torch's own choice.

    Args:
        query: [batch, H, length, D].
        key: [batch, H, key length, D].
        value: like ``key``.
        mask: bool, [batch, key length]; True = attend. At least one a sample.

    Returns:
        Shaped like ``query``; fused kernels give it a memory order in which D, then H is innermost.
    """
    if query.is_cuda:
        return _attend_in_parts(query, key, value, mask, _LARGEST_BATCH, _MOST_ELEMENTS)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=_bias(mask))


def _attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, largest_batch: int, most_elements: int
) -> Tensor:
    """`attention` of at most ``largest_batch`` samples, and ``most_elements`` of a tensor, at once; of one sample at least."""
    batch = query.shape[0]
    of_sample = max(math.prod(x.shape[1:]) for x in (query, key, value))
    at_once = max(1, min(largest_batch, most_elements // max(1, of_sample)))
    attend = _attention_of_flash if _flash(query) else _attention_of_torch
    if batch <= at_once:
        return attend(query, key, value, mask)
    size = -(-batch // -(-batch // at_once))  # as few parts as there can be, as equal as they can be
    queries, keys, values = (x.split(size) for x in (query, key, value))
    masks = [None] * len(queries) if mask is None else mask.split(size)
    parts = [attend(*part) for part in zip(queries, keys, values, masks, strict=True)]
    # Joined as [batch, length, H, D], which is the memory order of the parts.
    return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


def kernel_name(device: torch.device) -> str:
    """For the log: whose attention runs on ``device``, and why not flash-attn's."""
    if device.type != "cuda":
        return "attention of torch: flash-attn's is for GPUs"
    return "attention of flash-attn in bf16 and fp16" if HAS_FLASH else "attention of torch: flash-attn is not installed"


def _flash(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    # Its kernels cannot be launched for an empty tensor, which a rank with an empty shard has, nor for larger heads.
    return (
        HAS_FLASH
        and query.is_cuda
        and half
        and query.numel() > 0
        and query.shape[-1] <= 256
        and not torch.compiler.is_compiling()
    )


def _attention_of_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        return flash_attn_func(query, key, value).transpose(1, 2)
    batch, length = query.shape[:2]
    order, there, key_ends = pack(mask)
    # What no sample attends to gets whatever gradient was in memory: `where` stops it.
    key, value = (torch.where(there[:, None, None], x.flatten(0, 1)[order], 0) for x in (key, value))
    query_ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    attended = flash_attn_varlen_func(query.flatten(0, 1), key, value, query_ends, key_ends, length, mask.shape[1])
    return attended.unflatten(0, (batch, length)).transpose(1, 2)


@torch.compiler.allow_in_graph  # the compiler runs it while it makes the graph, instead of reading it
def _attention_of_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    with _only(_backend(query, key, value, mask)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=_bias(mask))


def _bias(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, None, None, :]


def _backend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> SDPBackend | None:
    """The fastest backend for a call, as far as it is known or may be measured now; None: torch's own choice."""
    tensors = query, key, value
    if torch.compiler.is_compiling() and any(type(size) is not int for x in tensors for size in (*x.shape, *x.stride())):
        return None  # they are symbols, which a comparison would bind to what they are now
    if min(query.shape[2], key.shape[2]) > _SHORT or query.numel() == 0 or key.numel() == 0:
        return None
    kind = _kind(query, key, value, mask)
    if kind not in _fastest:
        if not _may_measure(*tensors):
            return None
        _fastest[kind] = _choose(_measure(query, key, value, mask))
    return _fastest[kind]


def _kind(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> _Kind:
    tensors = query, key, value
    layouts = tuple((*x.shape, *x.stride()) for x in tensors)
    needs_gradient = tuple(torch.is_grad_enabled() and x.requires_grad for x in tensors)
    return _Kind(query.device, query.dtype, layouts, mask is not None, needs_gradient)


def _may_measure(*tensors: Tensor) -> bool:
    """Whether a GPU computes on these now: not under a compiler, a mode of torch's dispatcher, or a capture."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and all(type(x) is Tensor and x.is_cuda for x in tensors)
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> dict[SDPBackend | None, float]:
    """Milliseconds of a call on the GPU, with its backward where there is one, by backend; None: torch's own choice."""
    bias, gradients = _bias(mask), torch.is_grad_enabled()
    q, k, v = (x.detach().requires_grad_(gradients and x.requires_grad) for x in (query, key, value))
    wanted = [x for x in (q, k, v) if x.requires_grad]

    def call() -> None:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if wanted:
            torch.autograd.grad(attended, wanted, attended.detach())

    parameters = SDPAParams(q, k, v, bias, 0.0, False, False)
    usable = [backend for backend, can_use in _CAN_USE.items() if can_use(parameters)]
    times: dict[SDPBackend | None, float] = {}
    # Hooks of a checkpoint or an offload, in which the call may stand, must not see what is only tried.
    with saved_tensors_hooks(_keep, _keep):
        for backend in (None, *usable):
            try:
                with _only(backend):
                    times[backend] = _time(call)
            except RuntimeError:  # there may be no memory, or no plan of cuDNN
                continue
    return times


def _choose(times: dict[SDPBackend | None, float]) -> SDPBackend | None:
    """The fastest, where it is clearly faster than torch's own choice (None)."""
    if None not in times:
        return None
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < _CLEARLY * times[None] else None


def _only(backend: SDPBackend | None) -> AbstractContextManager[Any]:
    return nullcontext() if backend is None else sdpa_kernel(backend)


def _time(call: Callable[[], None]) -> float:
    """Milliseconds of the GPU for a call, the median of some. Waits for the device."""
    for _ in range(2):  # cuDNN's plans are made, and memory is there
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_REPETITIONS + 1)]
    torch.cuda._sleep(_HEAD_START)  # else it would be the host's launches that are timed
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairwise(events))


def _keep(x: Tensor) -> Tensor:
    return x


def pack(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to bring the keys that are attended to, of all samples, one after another; the others follow. Without a host sync.

    ``mask`` [batch, key length] -> the order of the flattened keys, [batch x key length]; which of those in that order are
    attended to, bool; and where each sample's begin and the last one's end, int32 [batch + 1].
    """
    flat = mask.flatten()
    order = torch.argsort(flat.byte(), descending=True, stable=True)
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return order, flat[order], ends
