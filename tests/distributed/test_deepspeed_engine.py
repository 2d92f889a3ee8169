"""Training through ``dsp.deepspeed_initialize`` against plain torch in one process: losses, norms and weights under SGD."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.training import rectified_flow

CONFIG = VideoDiTConfig(layers=1, hidden=32, heads=2, conditioning_size=6, patch=(1, 2, 2))
STEPS, LR = 3, 0.05


@dataclass(frozen=True)
class Case:
    sequence: int
    data: int
    zero: int
    accumulation: int = 1
    clip: float = 0.0
    T: int = 4
    H: int = 4
    W: int = 4

    @property
    def batch(self) -> int:
        return 2 * self.data * self.accumulation


def _model() -> VideoDiT:
    """Seeded noise on every parameter, since zero-initialised ones would hide errors."""
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _batch(case: Case, step: int) -> dict[str, Tensor]:
    """The whole global batch of a step; its first samples have a clean first frame."""
    g = torch.Generator().manual_seed(step)
    shape = (case.T, case.batch, 3, case.H, case.W)
    timesteps = torch.rand(case.T, case.batch, generator=g).clamp(min=0.1)
    if case.T > 1:
        timesteps[0, : case.batch // 2] = 0
    return {
        "video": torch.randn(shape, generator=g),
        "noise": torch.randn(shape, generator=g),
        "timesteps": timesteps,
        "conditioning": torch.randn(case.batch, 3, 6, generator=g),
        "mask": torch.rand(case.batch, 3, generator=g) < 0.7,
        "drop": torch.rand(case.batch, generator=g) < 0.3,
    }


def _loss(model: nn.Module, batch: dict[str, Tensor], frames: range, group: dist.ProcessGroup | None) -> Tensor:
    """The loss of a micro-batch of whole clips, on this rank's frames; with no group, in plain torch on all frames."""
    every = rectified_flow.frame_times(batch["timesteps"], 1, range(len(batch["timesteps"])))
    times = every[frames.start : frames.stop]
    video, noise = (batch[name][frames.start : frames.stop] for name in ("video", "noise"))
    noisy = rectified_flow.add_noise(video, noise, times)
    velocity = model(noisy, batch["timesteps"], batch["conditioning"], batch["mask"], batch["drop"], group=group)
    if group is None:
        active = (every > 0).sum(dim=(0, 2, 3, 4))
        error = (velocity - (noise - video)).square().mean(dim=(2, 3, 4)) * (times[:, :, 0, 0, 0] > 0)
        return (error.sum(0) / active).mean()
    weights = rectified_flow.frame_weights(times, every)
    return rectified_flow.velocity_loss(velocity, noise - video, weights, group)


def _reference(case: Case) -> tuple[list[float], list[float], VideoDiT]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(STEPS):
        loss = _loss(model, _batch(case, step), range(case.T), None)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), case.clip or math.inf).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, model


def _train(case: Case) -> None:
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": case.accumulation,
        "train_batch_size": case.batch,
        "gradient_clipping": case.clip,
        "zero_optimization": {"stage": case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": case.sequence},
    }
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    model = _model()
    engine, *_ = dsp.deepspeed_initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=config, mesh=mesh
    )
    assert engine.train_batch_size() == case.batch
    frames = range(*dsp.shard_range(case.T, case.sequence, group.rank()))
    losses, norms = [], []
    for step in range(STEPS):
        whole = _batch(case, step)
        value = torch.zeros(())
        for micro in range(case.accumulation):
            first = 2 * (micro * case.data + mesh.rank("data"))
            part = {
                name: tensor[:, first : first + 2] if name in ("video", "noise", "timesteps") else tensor[first : first + 2]
                for name, tensor in whole.items()
            }
            loss = _loss(engine, part, frames, group)
            engine.backward(loss)
            engine.step()
            value += loss.detach() / case.accumulation
        dist.all_reduce(value)
        losses.append(value.item() / dist.get_world_size())
        norms.append(engine.get_global_grad_norm())

    expected_losses, expected_norms, expected = _reference(case)
    torch.testing.assert_close(losses, expected_losses, rtol=2e-6, atol=0)
    if case.zero:  # DeepSpeed reports no norm in stage 0
        torch.testing.assert_close([float(norm) for norm in norms], expected_norms, rtol=1e-5, atol=0)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for name, parameter in model.named_parameters():
            reference = expected.get_parameter(name).detach()
            error = (parameter.detach() - reference).abs().max() / reference.abs().max()
            assert error < 2e-6, f"{name}: {error}"
    assert engine.global_samples == STEPS * case.batch
    assert engine.tput_timer.batch_size == case.batch
    engine.destroy()
    del engine, model
    gc.collect()


# A pairwise cover of sequence, data, ZeRO stage, accumulation, clipping, even and uneven T and H x W.
CASES = [
    Case(1, 1, 0),
    Case(2, 1, 1, accumulation=2, clip=0.1, T=5, H=6, W=2),
    Case(2, 2, 0, clip=0.1, T=4, H=6),
    Case(3, 1, 2, T=5, H=4, W=5),
    Case(1, 2, 3, accumulation=2, T=5),
    Case(3, 1, 3, clip=0.1, T=3, H=6, W=2),
    Case(2, 2, 2, accumulation=2, clip=0.1, T=5, H=4),
    Case(3, 1, 0, accumulation=2, T=7, H=6, W=2),
    Case(2, 2, 3, T=5, H=6, W=2, clip=0.1),
    Case(1, 2, 1, T=4, clip=0.1),
    Case(3, 2, 1, T=2, H=4, W=2),  # fewer frames than ranks: one holds none, and one holds no token of space
    Case(3, 2, 2, accumulation=2, clip=0.1, T=5),
]


# With each stage in `make test`; the others beside the parallelism matrix, in `make test-long`.
_SHORT = [CASES[index] for index in (1, 7, 8, 10, 11)]
_LONG = [pytest.param(case, marks=pytest.mark.long) for case in CASES if case not in _SHORT]


@pytest.mark.parametrize("case", [*_SHORT, *_LONG], ids=str)
def test_training_equals_one_process(ranks, case):
    ranks(case.sequence * case.data, _train, case)


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _engine(**keywords):
    model = _Linear()
    return dsp.deepspeed_initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **keywords)


def _batch_sizes() -> list[float]:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "sequence_parallel": {"size": 2}}
    mesh = dsp.initialize(config)
    data = torch.utils.data.TensorDataset(torch.arange(24.0)[:, None])
    engine, _, loader, _ = _engine(config=config, mesh=mesh, training_data=data)
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (8, 2)
    seen = [value for (batch,) in loader for value in batch[:, 0].tolist()]
    for (batch,) in loader:
        engine.backward(engine(batch).mean())
        engine.step()
    assert engine.global_samples == 24
    engine.set_train_batch_size(16)
    assert (engine.train_batch_size(), engine.gradient_accumulation_steps()) == (16, 4)
    engine.set_train_micro_batch_size(1)
    assert engine.train_batch_size() == 8
    with pytest.raises(dsp.UsageError, match="multiple of micro batch 1 x data 2"):
        engine.set_train_batch_size(7)
    return seen


def test_batch_sizes_and_loader_count_samples_once(ranks):
    seen = ranks(4, _batch_sizes)
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert sorted(seen[0] + seen[2]) == list(range(24))


def _refusals() -> list[str]:
    mesh = dsp.Mesh(sequence=2)
    base = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel": {"size": 2}}
    messages = []
    for keywords in (
        {"config": {**base, "sequence_parallel": {"size": 1}}},
        {"config": {**base, "train_batch_size": 4, "gradient_accumulation_steps": 2}},
        {"config": {"sequence_parallel": {"size": 2}}},
        {"config": {**base, "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}},
        {"config": {**base, "sequence_parallel_size": 2}},
        {"config": {**base, "sequence_parallel": {"size": 2, "cuda_graphs": True}}},
        {"config": {**base, "sequence_parallel": {"size": 2, "compile": True}}},
        {},
    ):
        with pytest.raises(dsp.UsageError) as error:
            _engine(mesh=mesh, **keywords)
        messages.append(str(error.value))
    return messages


def test_configs_that_do_not_fit_are_refused(ranks):
    signs = ["sequence degree 1", "train_batch_size=4", "neither", "zero_hpz", "sequence_parallel_size"]
    signs += ["CUDA graphs need a GPU", "call dsp.compile_stages", "ds_config once"]
    for messages in ranks(2, _refusals):
        for sign, message in zip(signs, messages, strict=True):
            assert sign in message
