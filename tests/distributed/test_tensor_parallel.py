"""The video transformer on tensor x sequence ranks against one process, in fp64, with noise on zero-initialised parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap
from megatron_dsp.tensor import TensorParallel, own_shard, whole_shape

CONFIG = VideoDiTConfig(layers=2, hidden=24, heads=6, conditioning_size=6, patch=(1, 2, 2))
B = 2


def _with_noise(model: VideoDiT) -> VideoDiT:
    """Noise on every parameter; the same on all ranks, of which each takes its part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(whole_shape(parameter), generator=generator, dtype=torch.float64)
            parameter += 0.2 * own_shard(noise, like=parameter)
    return model


def _compare(
    tensor: int,
    sequence: int,
    T: int,
    H: int,
    sequence_dim: int | None,
    recompute: bool,
    backend: str,
    chunks: int,
    along: str = "sharded",
):
    mesh = dsp.Mesh(tensor=tensor, sequence=sequence)
    group = mesh.group("sequence")
    cut = "stages" if along == "sharded" else "ends"
    set_overlap(group, FixedOverlap(chunks, along=along, cut=cut) if chunks > 1 else None)
    torch.manual_seed(0)
    reference = _with_noise(VideoDiT(CONFIG).double())
    torch.manual_seed(0)
    parallel = TensorParallel(mesh.group("tensor"), sequence_dim=sequence_dim)
    model = _with_noise(VideoDiT(CONFIG, tensor=parallel, recompute=recompute).double())

    torch.manual_seed(1)
    video = torch.randn(T, B, 3, H, 8, dtype=torch.float64)
    weight = torch.linspace(0.5, 2, video.numel(), dtype=torch.float64).view_as(video)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    side = torch.rand(T, B).double(), torch.randn(B, 3, 6).double(), mask, torch.tensor([False, True])
    expected = reference(video, *side)
    (expected**2 * weight).mean().backward()

    frames = slice(*dsp.shard_range(T, sequence, group.rank()))
    with dsp.ledger() as moved:
        output = model(video[frames], *side, group=group, backend=backend)
        (output**2 * weight[frames]).sum().mul(sequence / video.numel()).backward()
    torch.testing.assert_close(output, expected[frames], rtol=1e-12, atol=1e-12)
    for (name, parameter), whole in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient, group=group)
        error = (gradient / sequence - own_shard(whole.grad, like=parameter)).abs() - 1e-10 * whole.grad.abs().max()
        assert error.max() < 1e-13, name
    return moved.by("operation")


CASES = [  # tensor, sequence, T, H: heads, channels and the MLP's width are even over tensor; T and space over sequence are not
    (2, 1, 3, 6),
    (2, 2, 5, 4),
    (3, 1, 4, 6),
    (2, 3, 7, 4),
]


@pytest.mark.parametrize("sequence_dim", [None, 2], ids=["whole", "sequence sharded"])
@pytest.mark.parametrize(("tensor", "sequence", "T", "H"), CASES)
def test_outputs_and_gradients(ranks, tensor, sequence, T, H, sequence_dim):
    for recompute in (False, True):
        ranks(tensor * sequence, _compare, tensor, sequence, T, H, sequence_dim, recompute, "dsp", 1)


@pytest.mark.parametrize("sequence_dim", [None, 2], ids=["whole", "sequence sharded"])
@pytest.mark.parametrize(("backend", "chunks"), [("dsp", 2), ("ulysses", 1), ("ulysses", 2), ("ring", 1)])
def test_with_overlap_and_other_backends(ranks, backend, chunks, sequence_dim):
    ranks(4, _compare, 2, 2, 6, 4, sequence_dim, False, backend, chunks)


@pytest.mark.parametrize("sequence_dim", [None, 2], ids=["whole", "sequence sharded"])
@pytest.mark.parametrize("recompute", [False, True])
def test_with_overlap_at_the_ends_of_stages(ranks, recompute, sequence_dim):
    ranks(4, _compare, 2, 2, 6, 4, sequence_dim, recompute, "dsp", 2, "space")


@pytest.mark.parametrize("sequence_dim", [None, 2], ids=["whole", "sequence sharded"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_each_byte_of_a_switch_is_sent_once(ranks, sequence_dim, chunks):
    T, H, sequence = 6, 4, 2
    S = H // 2 * 8 // 2
    positions = (T // sequence) * B * (S // sequence) * 8  # bytes of a channel that one rank sends in a switch
    # All switches but the last are of tokens; that one comes after the head, unless tensor ranks have shards of space there.
    tokens, patches = (2 * CONFIG.layers - 1) * positions * CONFIG.hidden, positions * CONFIG.patch_channels
    naive = ranks(2, _compare, 1, sequence, T, H, None, False, "dsp", chunks)
    shared = ranks(4, _compare, 2, sequence, T, H, sequence_dim, False, "dsp", chunks)
    for operation in ("switch", "switch adjoint"):
        assert {moved[operation][1] for moved in naive} == {tokens + patches}
        last = patches if sequence_dim is None else positions * CONFIG.hidden // 2
        assert {moved[operation][1] for moved in shared} == {tokens // 2 + last}


def test_with_one_sequence_rank_no_switch_is_completed(ranks):
    for moved in ranks(2, _compare, 2, 1, 4, 4, None, False, "dsp", 1):
        assert {operation.removesuffix(" adjoint") for operation in moved} == {"tensor all-reduce"}


def _uneven(what: str) -> str:
    mesh = dsp.Mesh(tensor=2)
    if what == "heads":
        tensor = TensorParallel(mesh.group("tensor"))
        with pytest.raises(dsp.UsageError) as error:
            VideoDiT(replace(CONFIG, heads=3), tensor=tensor)
    else:
        model = VideoDiT(CONFIG, tensor=TensorParallel(mesh.group("tensor"), sequence_dim=2))
        side = torch.rand(2, 1), torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)
        with pytest.raises(dsp.UsageError) as error:
            model(torch.randn(2, 1, 3, 2, 6), *side)
    return str(error.value)


def test_uneven_heads_and_tokens_are_refused(ranks):
    for message in ranks(2, _uneven, "heads"):
        assert message == "heads=3 must be a multiple of the tensor degree 2; choose another degree"
    for message in ranks(2, _uneven, "tokens"):
        assert "its size 3 must be a multiple of the tensor degree 2" in message
