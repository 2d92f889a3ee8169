"""SIGTERM on one rank: all ranks stop at the same iteration, at most one later, with a checkpoint; nobody waits to be asked."""

from __future__ import annotations

import json
import os
import signal
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.training import arguments as flags
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.loop import MicroBatch, _ask_all_ranks, train

SIGNALLED, ITERATIONS = 2, 6  # counted from 0; the last one would be ITERATIONS - 1


class Workload:
    """A line through samples' positions; one rank is signalled while it computes the loss of an iteration."""

    def __init__(self, signalled: int | None):
        self.calls, self.signalled = 0, signalled

    def loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        if self.calls == self.signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls += 1
        return model(torch.tensor(samples, dtype=torch.float32)[:, None]).square().mean()

    def validation_loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        return model(torch.tensor(samples, dtype=torch.float32)[:, None]).square().mean()

    def micro_batch(self, samples: list[int], validation: bool) -> MicroBatch:
        raise NotImplementedError("this job has no pipeline")

    def forward_flops(self, samples: list[int]) -> int:
        return 1


def _job(folder: str, signalled: int) -> Progress:
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank = dist.get_rank()
    path = Path(folder) / f"{rank}.json"
    sections = {"train_batch_size": 4, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}}
    path.write_text(json.dumps(sections))
    line = ["--deepspeed_config", str(path), "--train-iters", str(ITERATIONS), "--eval-iters", "0", "--save", f"{folder}/save"]
    arguments = flags.parser("").parse_args([*line, "--micro-batch-size", "2"])
    mesh = dsp.initialize(flags.settings(arguments))
    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    config = flags.settings(arguments)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    with TrainingLog(rank=rank, total=ITERATIONS, monitor=engine.monitor) as log:
        progress = train(engine, Workload(signalled if rank == 1 else None), mesh, arguments, log)
    engine.destroy()
    return progress


@pytest.mark.parametrize(("signalled", "last"), [(SIGNALLED, SIGNALLED + 2), (ITERATIONS - 1, ITERATIONS)])
def test_all_ranks_stop_one_iteration_after_that_of_the_signal(ranks, tmp_path, signalled, last):
    assert ranks(2, _job, str(tmp_path), signalled) == [Progress(last, 4 * last)] * 2
    assert (tmp_path / "save" / "latest").read_text() == f"global_step{last}"


def _ask_before_another_rank() -> bool:
    rank, message = dist.get_rank(), torch.zeros(1)
    if rank == 1:
        dist.irecv(message, 0).wait(timedelta(seconds=10))
    answer = _ask_all_ranks(rank == 1)
    if rank == 0:
        dist.send(message, 1)
    return answer()


def test_asking_does_not_wait_for_other_ranks(ranks):
    assert ranks(2, _ask_before_another_rank) == [True, True]
