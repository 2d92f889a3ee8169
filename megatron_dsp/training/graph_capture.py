"""Passes of a model captured in CUDA graphs: the host launches one graph forward and one backward, whatever is in them.

Semantics relied on (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs): capture records work and runs none of
it. A graph replays the same kernels on the same memory; what it computes stays there until it, or another graph of the same
pool, is replayed. A stream that waits for an event of a captured stream is captured too, and must be waited for before capture
ends: so are the side streams of switches and NCCL's.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import FixedOverlap, overlap_of, set_overlap
from megatron_dsp.reshard.exchange import Exchange, open_exchanges
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.stages.overlap import Overlap
from megatron_dsp.reshard.stages.schedule import Schedule
from megatron_dsp.reshard.stages.stage import Stage

# Passes of a shape before it is captured: in them kernels are compiled, chosen and loaded, and rare shapes cost no capture.
_EAGER_PASSES = 2

Tensors = Sequence[Tensor | None]
Counts = dict[Exchange, dict[Label, tuple[int, int]]]


def capture(model: nn.Module) -> None:
    """Let CUDA graphs run the model's training passes from now on, with collectives and side streams in them.

    A shape runs two passes as usual, and more while an overlap that measures has not decided for it. Then its forward and
    backward are captured, and replayed whenever the shape comes back. Without gradients, and in eval mode, the model runs as
    usual. Parameters get their gradients through autograd, after the whole backward: so hooks on them, as of DDP and of ZeRO 0
    to 2, work as usual, but what they reduce does not overlap with backward.

    What the model does on the host (prints, counters, hooks of its modules) happens at capture and not in replays. Inputs are
    tensors, or values that can be hashed, and all that sizes inside depend on is among them, as the global size of what a rank
    has a shard of: ranks must tell shapes apart alike. The next pass overwrites what a pass gives. The backward of a pass comes
    before the next forward.

    Args:
        model: on its GPU, before DDP wraps it, or a DeepSpeed engine's ``module``.

    Raises:
        UsageError: for what cannot be captured, with the reason.
    """
    _refuse_what_cannot_be_captured(model)
    device = next(model.parameters()).device
    # As torch.cuda.make_graphed_callables does it.
    model.forward = CapturedForward(model, CudaGraphs(device))


def _refuse_what_cannot_be_captured(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(getattr(model, "module", None), nn.Module):
        raise UsageError(f"capture of a {kind}: what it does around the model would be done once; capture the model in it")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise UsageError(
                f"capture of a {kind} in ZeRO stage 3: it gathers and frees weights around each module, at addresses that "
                "change, and a graph has the addresses of its capture; use ZeRO stage 0, 1 or 2"
            )
        if isinstance(parameter, DTensor):
            raise UsageError(
                f"capture of a {kind} whose weight {name} is a DTensor: FSDP2 gathers and frees weights around each module, at "
                "addresses that change, and a graph has the addresses of its capture; use DDP, or ZeRO stage 0, 1 or 2"
            )
        if not parameter.is_cuda:
            raise UsageError(f"capture of a {kind} whose weight {name} is on {parameter.device}: CUDA graphs need a GPU")
    for exchange in open_exchanges():
        if exchange.agreement is not None:
            raise UsageError(
                f"capture of a {kind} with check_collectives: ranks compare on the host, which replays leave out; turn one of "
                "the two off"
            )


class Recorder(Protocol):
    """Makes replays of what a function does."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it where it will be recorded."""

    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """What ``run`` gives, and a function that computes it again, in the same memory."""


class CudaGraphs:
    """Records on a stream of its own, into a pool of memory of which one pass is in use at a time."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object]) -> None:
        """As `Recorder.warm_up`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], Tensors]) -> tuple[Tensors, Callable[[], None]]:
        """As `Recorder.record`. Waits for the device."""
        graph = torch.cuda.CUDAGraph()
        # "thread_local": threads that read data may allocate memory meanwhile; what capture forbids is forbidden here alone.
        with _no_collection(), torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = run()
        return results, graph.replay


class CapturedForward:
    """A module's forward, which `capture` describes."""

    def __init__(self, module: nn.Module, recorder: Recorder):
        self._module, self._forward, self._recorder = module, module.forward, recorder
        self._passes: dict[Hashable, int] = {}
        self._graphs: dict[Hashable, _Graphs] = {}
        self._weights: list[tuple[int, bool]] = []  # that were captured
        self._last: weakref.ref[_Pass] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if not (self._module.training and torch.is_grad_enabled() and parameters):
            return self._forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        key = (repr(spec), *(_kind(leaf) for leaf in leaves))
        if self._passes.get(key, 0) < _EAGER_PASSES:
            with _watched_overlaps() as watched:
                result = self._forward(*args, **kwargs)
            if all(overlap.decided for overlap in watched):
                self._passes[key] = self._passes.get(key, 0) + 1
            return result
        self._refuse_a_second_pass()
        self._forget_other_weights()
        if key not in self._graphs:
            self._graphs[key] = self._record(leaves, spec, parameters)
        graphs, under_way = self._graphs[key], _Pass()
        self._last = weakref.ref(under_way)
        outputs = _Replay.apply(graphs, under_way, *filter(torch.is_tensor, leaves), *parameters)
        return tree_unflatten(outputs, graphs.spec)

    def _refuse_a_second_pass(self) -> None:
        last = None if self._last is None else self._last()
        if last is not None and not last.is_over:
            raise UsageError(
                "a captured model got a second forward before the backward of the first one, whose memory it has: run the "
                "backward, or let go of its result, or do not capture"
            )

    def _forget_other_weights(self) -> None:
        """Graphs know weights by their addresses, which change where a model is moved or its weights are replaced."""
        weights = [(weight.data_ptr(), weight.requires_grad) for weight in self._module.parameters()]
        if weights != self._weights:
            self._weights, self._graphs = weights, {}

    def _record(self, leaves: list[Any], spec: TreeSpec, parameters: list[nn.Parameter]) -> _Graphs:
        """The graphs of a shape. Collective, as passes are."""
        if any(torch.is_autocast_enabled(kind) for kind in {parameter.device.type for parameter in parameters}):
            raise UsageError(
                "capture under torch.autocast, which keeps casts of weights that replays would not renew: give the weights "
                "the dtype instead"
            )
        static = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if torch.is_tensor(leaf) else leaf for leaf in leaves
        ]
        args, kwargs = tree_unflatten(static, spec)
        inputs = list(filter(torch.is_tensor, static))
        sources = [*inputs, *parameters]
        wanted = [source for source in sources if source.requires_grad]
        at_end: list[Tensor] = []  # outputs with their graph, from forward to backward
        specs: list[TreeSpec] = []

        def forward() -> Tensors:
            at_end[:], output_spec = tree_flatten(self._forward(*args, **kwargs))
            specs[:] = [output_spec]
            return [output.detach() for output in at_end]

        def backward(gradients: Tensors) -> Tensors:
            ends = [end for end in at_end if end.requires_grad]
            at_end.clear()
            given = [gradient for gradient in gradients if gradient is not None]
            found = iter(torch.autograd.grad(ends, wanted, given, allow_unused=True))
            return [next(found) if source.requires_grad else None for source in sources]

        def zeros() -> Tensors:
            return [torch.zeros_like(end) if end.requires_grad else None for end in at_end]

        self._recorder.warm_up(lambda: (forward(), backward(zeros())))
        with discount() as forward_counts:
            outputs, replay_forward = self._recorder.record(forward)
        gradients = zeros()
        with discount() as backward_counts:
            results, replay_backward = self._recorder.record(lambda: backward(gradients))
        return _Graphs(
            specs[0],
            _Replayed(inputs, outputs, replay_forward, forward_counts),
            _Replayed(gradients, results, replay_backward, backward_counts),
        )


class _Replayed(NamedTuple):
    """A graph: the memory that it reads and writes, and what it moves, which replays count."""

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]
    counts: Counts

    def run(self, inputs: Sequence[Tensor]) -> Tensors:
        """The outputs for ``inputs``, in the memory of the graph."""
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(given)
        self.replay()
        for exchange, counts in self.counts.items():
            for label, (calls, sent) in counts.items():
                calls_before, sent_before = exchange.counts.get(label, (0, 0))
                exchange.counts[label] = calls_before + calls, sent_before + sent
        return self.outputs


class _Graphs(NamedTuple):
    """Those of a shape; ``spec`` is how the model gives its outputs."""

    spec: TreeSpec
    forward: _Replayed
    backward: _Replayed


class _Pass:
    """A forward whose backward is to come, as long as anybody can ask for it."""

    is_over = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graphs: _Graphs, under_way: _Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs, ctx.under_way = graphs, under_way
        given = len(graphs.forward.inputs)  # the others are parameters, which stay where they are
        outputs = [output.detach() for output in graphs.forward.run(inputs[:given]) if output is not None]
        ends = zip(outputs, graphs.backward.inputs, strict=True)
        ctx.mark_non_differentiable(*(output for output, gradient in ends if gradient is None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.under_way.is_over:
            raise UsageError("the backward of a captured model runs once: its graph has overwritten what it needs")
        ctx.under_way.is_over = True
        # These tensors themselves, which the graph keeps: of others with the same memory autograd would make ``.grad``, which
        # the next replay would overwrite (https://github.com/pytorch/pytorch/issues/181723).
        return None, None, *ctx.graphs.backward.run(gradients)


class _WatchedOverlap:
    """An overlap, and whether what it chose is decided."""

    def __init__(self, overlap: Overlap):
        self._overlap, self.decided = overlap, True

    @property
    def decisions(self) -> list[str]:
        """As of `Overlap`."""
        return self._overlap.decisions

    def choose(self, *arguments: Any) -> Schedule:
        """As of `Overlap`."""
        schedule = self._overlap.choose(*arguments)
        self.decided &= bool(schedule.reason)  # a trial has none
        return schedule

    def watch(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """As of `Overlap`."""
        return self._overlap.watch(stages)


@contextmanager
def _watched_overlaps() -> Iterator[list[_WatchedOverlap]]:
    """In the block, overlaps that measure are watched."""
    groups = [exchange.group for exchange in open_exchanges()]
    usual = [(group, overlap) for group in groups if (overlap := overlap_of(group)) and not isinstance(overlap, FixedOverlap)]
    watched = [_WatchedOverlap(overlap) for _, overlap in usual]
    try:
        for (group, _), overlap in zip(usual, watched, strict=True):
            set_overlap(group, overlap)
        yield watched
    finally:
        for group, overlap in usual:
            set_overlap(group, overlap)


@contextmanager
def discount() -> Iterator[Counts]:
    """What the block would move: it is captured, and not counted."""
    before = {exchange: dict(exchange.counts) for exchange in open_exchanges()}
    moved: Counts = {}
    yield moved
    for exchange in open_exchanges():
        was = before.get(exchange, {})
        for label, (calls, sent) in exchange.counts.items():
            calls_before, sent_before = was.get(label, (0, 0))
            if calls > calls_before:
                moved.setdefault(exchange, {})[label] = calls - calls_before, sent - sent_before
        exchange.counts = was


@contextmanager
def _no_collection() -> Iterator[None]:
    """In the block, Python collects no cycles: what is freed in one may wait for streams that are not captured."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _kind(leaf: Any) -> Hashable:
    """What graphs depend on of an input. Errors: UsageError for one that cannot be hashed."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    if not isinstance(leaf, Hashable):
        raise UsageError(f"a captured model got {leaf!r}: give it tensors, or values that can be hashed")
    return leaf
