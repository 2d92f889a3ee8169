"""Models with switches under torch.compile: one graph, and the results of eager mode."""

from __future__ import annotations

import shutil

import jobs
import pytest
import torch
import torch._dynamo.utils
import torch.distributed as dist
from compiled_job import Mixer, find_gradients
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap

_NEEDS_A_COMPILER = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler"
)


def _compare(model: nn.Module, run, backend: str, tolerance: float) -> None:
    """Loss, gradients and what is moved; then with another shape, which the compiler may make a dynamic one."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss, gradients, moved = find_gradients(model, run)
    loss_compiled, gradients_compiled, moved_compiled = find_gradients(model, lambda _: run(compiled))
    assert abs(loss - loss_compiled) <= tolerance
    assert moved == moved_compiled
    for expected, found in zip(gradients, gradients_compiled, strict=True):
        assert (expected - found).abs().max() <= tolerance


def _mixer(backend: str) -> None:
    model = Mixer(dist.group.WORLD)
    for T, S in ((7, 5), (9, 8)):
        x, mask = torch.randn(T, 2, S, 4, dtype=torch.float64), torch.rand(T, 2, S) < 0.5
        _compare(model, lambda m, x=x, mask=mask: m(x, mask), backend, 1e-14)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_all_primitives_in_one_graph(ranks, size):
    ranks(size, _mixer, "aot_eager")


@_NEEDS_A_COMPILER
@pytest.mark.long  # a compiler of C++ takes its time
def test_inductor(ranks):
    ranks(2, _mixer, "inductor")


# Without a dynamo reset between the shapes, and with the compiled code of the starts before.
@pytest.mark.parametrize(
    ("backend", "starts"), [("aot_eager", 1), pytest.param("inductor", 3, marks=[pytest.mark.long, _NEEDS_A_COMPILER])]
)
def test_a_compiled_model_takes_other_shapes_and_each_rank_its_own_code(backend, starts, tmp_path):
    for _ in range(starts):
        folder = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        status, output = jobs.run("torchrun", 2, "tests/distributed/compiled_job.py", backend, **folder)
        assert status == 0, output


def _video_dit(T: int) -> None:
    mesh = dsp.initialize({"sequence_parallel": {"size": dist.get_world_size()}})
    model = VideoDiT(VideoDiTConfig(layers=2, hidden=16, heads=2, conditioning_size=6)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    video = torch.randn(T, 2, 3, 4, 6, dtype=torch.float64)
    side = (
        torch.rand(T, 2, dtype=torch.float64),
        torch.randn(2, 3, 6, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.bool),
    )
    start, stop = dsp.shard_range(T, dist.get_world_size(), dist.get_rank())

    def run(m: nn.Module) -> Tensor:
        return dsp.mean_loss(m(video[start:stop], *side, group=mesh.group("sequence")).square())

    _compare(model, run, "aot_eager", 1e-13)


def test_the_video_transformer_is_one_graph(ranks):
    ranks(2, _video_dit, 5)


def noisy_models(count: int) -> list[VideoDiT]:
    """So many of the same, none of whose parameters is 0; all but the first two compute blocks again in backward."""
    config = VideoDiTConfig(layers=2, hidden=16, heads=2, conditioning_size=6, patch=(1, 2, 2))
    models = [VideoDiT(config, recompute=index > 1).double() for index in range(count)]
    torch.manual_seed(0)
    weights = {name: 0.2 * torch.randn_like(weight) for name, weight in models[0].state_dict().items()}
    for model in models:
        model.load_state_dict(weights)
    return models


def _stages(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    group = dist.group.WORLD
    model, compiled, recomputed = noisy_models(3)
    for each in (compiled, recomputed):
        dsp.compile_stages(each.blocks(), backend=backend)

    def compare(T: int, rows: int, others: list[VideoDiT], **how: str) -> int:
        """All gradients; returns how many graphs were compiled for them."""
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch.manual_seed(T)
        video, times = torch.randn(T, 1, 3, 2 * rows, 6).double(), torch.rand(T, 1).double()
        side = times, torch.randn(1, 3, 6).double(), torch.tensor([[True, True, False]])
        start, stop = dsp.shard_range(T, group.size(), group.rank())

        def run(m: nn.Module) -> Tensor:
            return dsp.mean_loss(m(video[start:stop], *side, group=group, **how).square(), group=group)

        expected = find_gradients(model, run)
        for other in others:
            loss, gradients, moved = find_gradients(other, run)
            assert abs(loss - expected[0]) <= 1e-12
            assert moved == expected[2]
            for a, b in zip(gradients, expected[1], strict=True):
                assert (a - b).abs().max() <= 1e-12
        return torch._dynamo.utils.counters["stats"]["unique_graphs"] - before

    # A graph for the spatial blocks and one for the temporal ones, whatever their number: T and S uneven, one shape twice.
    assert [compare(*shape, [compiled, recomputed]) for shape in ((5, 3), (3, 4), (5, 3))] == [2, 2, 0]
    # Both ends are cut in two. Spatial blocks enter whole once, then in chunks; temporal ones leave in chunks, then whole.
    set_overlap(group, FixedOverlap(2, cut="ends"))
    assert compare(5, 4, [compiled, recomputed]) <= 12
    set_overlap(group, None)
    compare(5, 3, [compiled], backend="ulysses")
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.long),
        pytest.param("inductor", marks=[pytest.mark.long, _NEEDS_A_COMPILER]),
    ],
)
def test_compiled_stages_share_graphs_and_leave_switches_outside(ranks, backend):
    """In whole stages, with ends in chunks, with recompute and with attention over the shard."""
    ranks(2, _stages, backend)
