"""Batches made ahead: the same as those made when they are asked for, on one thread, with its errors and its end."""

from __future__ import annotations

import gc
import threading
import time
import traceback
import weakref
from dataclasses import dataclass, field, fields

import pytest
import torch

from megatron_dsp.data import BatchesAhead, BatchRequest, Shape, VideoBatches

SHAPE = Shape(5, 2, 4, 6)
DAMAGED = 11  # the index of a sample that cannot be read
FRAMES = range(1, 4)
CPU = torch.device("cpu")


@dataclass
class Slow:
    """Samples that differ in how long they take to read, and note who reads them."""

    readers: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)  # reading waits for it
    conditioning_tokens = 3
    conditioning_width = 4

    def __len__(self) -> int:
        return 12

    def shape(self, index: int) -> Shape:
        return SHAPE

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        assert self.open.wait(10)
        time.sleep(index % 3 / 500)
        self.readers.append(threading.current_thread().name)
        self.indices.append(index)
        if index == DAMAGED:
            raise OSError("the disk has gone")
        return torch.arange(stop - start).reshape(-1, 1, 1, 1).expand(stop - start, *SHAPE[1:]) + float(index)

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((3, 4), float(index)), torch.arange(3) <= index % 3


def _batches(samples: Slow, seed: int = 3) -> VideoBatches:
    return VideoBatches(
        samples=samples, global_batch_size=2, seed=seed, patch=(2, 2, 2), drop_probability=0.5, clean_frame_probability=0.5
    )


def _read_at_once() -> Slow:
    samples = Slow()
    samples.open.set()
    return samples


def _request(batches: VideoBatches, number: int) -> BatchRequest:
    return BatchRequest(batches, (2 * number, 2 * number + 1), FRAMES)


def _positions(batches: VideoBatches, damaged: bool) -> list[int]:
    """Numbers of requests in two epochs, with or without the damaged sample."""
    order = batches._order
    return [number for number in range(12) if (DAMAGED in (order[2 * number], order[2 * number + 1])) == damaged]


def test_batches_are_the_same_in_whatever_order_and_however_far_ahead():
    training, validation = (_batches(_read_at_once(), seed) for seed in (3, 4))
    reference = _batches(_read_at_once())
    ahead = BatchesAhead(CPU)
    numbers = _positions(training, damaged=False)
    # In turn, then what was not expected, then in turn again with other batches between.
    order = [*numbers[:3], numbers[6], numbers[1], *numbers[2:8]]
    for number, following, last in zip(order, [*order[1:], order[0]], [*order[2:], *order[:2]], strict=True):
        expected = [_request(training, other) for other in (following, last)]
        batch = ahead.take(_request(training, number), expected)
        alone = reference.batch(*_request(reference, number)[1:])
        for part in fields(batch):
            assert torch.equal(getattr(batch, part.name), getattr(alone, part.name)), part.name
        other = _positions(validation, damaged=False)[number % 4]
        assert torch.equal(
            ahead.take(_request(validation, other)).video, validation.batch(*_request(validation, other)[1:]).video
        )
    assert set(training.samples.readers) == {"batches_0"}
    assert len(training.samples.indices) < 4 * len(order), "what was made ahead is taken"


def test_the_next_batch_is_made_before_it_is_asked_for_and_a_wrong_guess_is_dropped():
    samples = Slow()
    batches, ahead = _batches(samples), BatchesAhead(CPU)
    first, second, third, fourth = (_request(batches, number) for number in _positions(batches, damaged=False)[:4])
    samples.open.set()
    ahead.take(first, [second, third])
    deadline = time.monotonic() + 10
    while len(samples.indices) < 6 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert samples.indices == [batches._order[position] for request in (first, second, third) for position in request.positions]
    samples.open.clear()
    ahead.take(second, [third, fourth])  # the reader stands still, and yet it is there
    samples.open.set()
    ahead.take(first, [second])
    ahead.take(first, [])
    assert ahead._coming == {}


def test_an_error_comes_with_its_batch_and_its_traceback():
    batches, ahead = _batches(_read_at_once()), BatchesAhead(CPU)
    good, bad = (_request(batches, _positions(batches, damaged)[0]) for damaged in (False, True))
    ahead.take(good, [bad])
    ahead.take(good)
    with pytest.raises(OSError, match="the disk has gone") as caught:
        ahead.take(bad, [good])
    assert "in read" in "".join(traceback.format_exception(caught.value))
    assert torch.isfinite(ahead.take(good).video).all()


def test_the_thread_ends_with_its_owner():
    ahead, batches = BatchesAhead(CPU), _batches(_read_at_once())
    ahead.take(_request(batches, 0), [])
    (thread,) = ahead._thread._threads
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()
