"""Batches on their way to one GPU: nobody waits for the device, and pinned memory stays until it was copied."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from work import missing

from megatron_dsp.data import BatchesAhead, BatchRequest, Shape, VideoBatches

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

LONG = 2_000_000_000  # cycles of the GPU: about a second, in which all is taken
SHAPE = Shape(4, 2, 64, 64)


class Constants:
    """Samples of one number each."""

    conditioning_tokens, conditioning_width = 3, 4

    def __len__(self) -> int:
        return 64

    def shape(self, index: int) -> Shape:
        return SHAPE

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        return torch.full((stop - start, *SHAPE[1:]), float(index))

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((3, 4), float(index)), torch.ones(3, dtype=torch.bool)


def _requests() -> list[BatchRequest]:
    batches = VideoBatches(
        samples=Constants(),
        global_batch_size=2,
        seed=3,
        patch=(1, 2, 2),
        drop_probability=0.5,
        clean_frame_probability=0.5,
    )
    return [BatchRequest(batches, (2 * number, 2 * number + 1), range(SHAPE.frames)) for number in range(16)]


def test_batches_arrive_whole_and_nobody_waits_for_the_device():
    device = torch.device("cuda", torch.cuda.current_device())
    ahead, requests = BatchesAhead(device), _requests()
    for _ in range(2):  # the second time, pinned memory is there already: making it may wait for the device
        ahead.take(requests[-1], [])
        torch.cuda.synchronize()
        torch.cuda._sleep(LONG)
        taken = [ahead.take(request, requests[number + 1 : number + 3]) for number, request in enumerate(requests[:-2])]
        waited = torch.cuda.current_stream().query()
        torch.cuda.synchronize()
        for request, batch in zip(requests, taken, strict=False):
            expected = request.batches.batch(request.positions, request.frames)
            for part in fields(batch):
                x = getattr(batch, part.name)
                assert x.device == device
                assert torch.equal(x.cpu(), getattr(expected, part.name)), part.name
    assert not waited


def test_memory_of_batches_is_pinned():
    batches, positions, frames = _requests()[0]
    memory = batches.empty(positions, frames, pin_memory=True)
    assert all(getattr(memory, part.name).is_pinned() for part in fields(memory))
    assert batches.batch(positions, frames, memory) is memory
