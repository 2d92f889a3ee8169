"""The primitives against slices of the whole tensor (bitwise), and their gradients against one process (fp64)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from overlap_transports import LateMessages
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.layout import RankRanges
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport import torch_transport
from megatron_dsp.reshard.transport.move import Move

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


# How a switch travels: an int is for messages, with runs of so many bytes one by one.
HOW = ["all-to-all", 1, 64, 1 << 20]


@st.composite
def movements(draw):
    """(ranks, shape, gather, split, dtype, order of storage, seed, how it travels)"""
    shape = draw(st.lists(st.integers(0, 7), min_size=2, max_size=6).filter(lambda s: torch.Size(s).numel() < 20000))
    dims = draw(st.permutations(range(len(shape))))
    negative = draw(st.booleans())
    gather, split = (dim - len(shape) if negative else dim for dim in dims[:2])
    storage = draw(st.permutations(range(len(shape))))
    return (
        draw(st.integers(1, 4)),
        shape,
        gather,
        split,
        draw(st.sampled_from(DTYPES)),
        storage,
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(HOW)),
    )


def _whole(shape: list[int], dtype: torch.dtype, storage: list[int], seed: int) -> Tensor:
    """A random tensor whose dims are stored in the order ``storage``: non-contiguous in general."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(-100, 100, [shape[dim] for dim in storage], generator=generator)
    return stored.to(dtype).permute([storage.index(dim) for dim in range(len(shape))])


def _bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


@contextmanager
def travelling(how: str | int, group: dist.ProcessGroup) -> Iterator[None]:
    """In the block, switches over ``group`` travel so."""
    transport, usual = exchange_of(group).transport, torch_transport._all_to_all
    if isinstance(how, int):
        transport._LEAST_RUN = how
    else:
        # As CUDA tensors do. Gloo is slow to find its peers for each all-to-all: this one is made of sends and receives.
        transport._find_route = lambda moves: torch_transport.AllToAll(moves, group.rank())
        torch_transport._all_to_all = LateMessages().all_to_all
    try:
        yield
    finally:
        torch_transport._all_to_all = usual


def _move(shape, gather, split, dtype, storage, seed, how):
    group = dist.group.WORLD
    whole = _whole(shape, dtype, storage, seed)
    with dsp.ledger() as moved:
        x = dsp.split(whole, dim=gather, group=group)
        with travelling(how, group):
            y = dsp.switch(x, gather=gather, split=split, size=shape[gather], group=group)
        back = dsp.gather(y, dim=split, size=shape[split], group=group)
    rank, size = group.rank(), group.size()
    assert torch.equal(_bits(y), _bits(whole.tensor_split(size, split)[rank]))
    assert y.shape == whole.tensor_split(size, split)[rank].shape
    assert back.shape == whole.shape
    assert torch.equal(_bits(back), _bits(whole))
    sent = {operation: sent for operation, (_, sent) in moved.by("operation").items()}
    own = dsp.shard_sizes(shape[gather], size)[rank], dsp.shard_sizes(shape[split], size)[rank]
    others = torch.Size(s for dim, s in enumerate(shape) if dim not in (gather % len(shape), split % len(shape))).numel()
    expected = own[0] * others * (shape[split] - own[1]) * whole.element_size()
    assert sent.get("switch", 0) == expected
    assert moved.calls == (2 if size > 1 else 0)


@given(movements())
@example((2, [1, 2, 1], 0, 1, torch.float32, [2, 1, 0], 0, "all-to-all"))  # one element, contiguous with a stride that is not 1
@example((2, [2, 1, 2], 0, 2, torch.bfloat16, [2, 1, 0], 0, 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_movement_is_bitwise_the_slice_of_the_whole(ranks, movement):
    ranks(movement[0], _move, *movement[1:])


@pytest.mark.long
@given(movements())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_movements_are_bitwise_the_slice_of_the_whole(ranks, movement):
    ranks(movement[0], _move, *movement[1:])


def _together(sizes: tuple[int, int], how: str | int) -> None:
    """Queries, keys, values (fewer heads, half precision) and a mask, [T, heads, S, ...]: one collective each way."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    T, S = sizes
    wholes = [torch.randn(T, 4, S, 3, dtype=torch.float64), torch.randn(T, 2, S, 5).bfloat16(), torch.rand(T, 1, S) < 0.5]
    xs = [dsp.split(whole, dim=0, group=group).clone() for whole in wholes]
    xs[0].requires_grad_()
    frozen = torch.randn(xs[0].shape, dtype=torch.float64)
    with dsp.ledger() as moved, travelling(how, group):
        ys = dsp.switch([*xs, frozen], gather=0, split=2, size=T, group=group)
        (ys[0] ** 2 * ys[3].detach()).sum().backward()
    assert isinstance(ys, tuple)
    for whole, y in zip(wholes, ys, strict=False):
        assert torch.equal(y, whole.tensor_split(size, 2)[rank])
    assert [y.requires_grad for y in ys] == [True, False, False, False]
    assert torch.equal(xs[0].grad, 2 * xs[0].detach() * frozen)
    T_r, S_r = (dsp.shard_sizes(n, size)[rank] for n in sizes)
    token = 4 * 3 * 8
    assert moved.by("operation") == {
        "switch": (1, T_r * (S - S_r) * (2 * token + 2 * 5 * 2 + 1)),
        "switch adjoint": (1, (T - T_r) * S_r * token),
    }
    assert dsp.switch([], gather=0, split=1, size=3, group=group) == ()


@pytest.mark.parametrize("sizes", [(4, 8), (5, 3), (1, 7)])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("how", ["all-to-all", 1, 1 << 20])
def test_several_tensors_in_one_switch(ranks, size, sizes, how):
    ranks(size, _together, sizes, how)


def _changes_in_place(how: str | int, channels: int) -> None:
    """Of what a switch and a gather return, and their gradients."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    whole = torch.randn(4, 6, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dims in ((0, 1), (1, 0)):
        gathered, split = dims
        x = dsp.split(whole, dim=gathered, group=group).clone().requires_grad_()
        with travelling(how, group):
            y = dsp.switch(x, gather=gathered, split=split, size=whole.shape[gathered], group=group)
            y *= 2
            z = dsp.gather(x, dim=gathered, size=whole.shape[gathered], group=group)
            z += 1
            (y.square().sum() + z.sum() / size).backward()
        assert torch.equal(y, 2 * whole.tensor_split(size, split)[rank])
        assert torch.equal(z, whole + 1)
        assert torch.allclose(x.grad, 8 * x.detach() + 1)


@pytest.mark.parametrize("channels", [2, 8000])  # the memory of large results is reused
@pytest.mark.parametrize("how", ["all-to-all", 1 << 20])
def test_results_may_be_changed_in_place(ranks, how, channels):
    ranks(2, _changes_in_place, how, channels)


def _lazy_flags() -> None:
    group = dist.group.WORLD
    whole = torch.randn(4, 6, dtype=torch.complex64)
    for lazy in (whole.conj(), whole.conj().imag):  # torch keeps the conjugation and the minus sign as flags of a view
        assert lazy.is_conj() or lazy.is_neg()
        y = dsp.switch(dsp.split(lazy, dim=0, group=group), gather=0, split=1, size=4, group=group)
        assert torch.equal(y, lazy.tensor_split(group.size(), 1)[group.rank()])
        own = lazy.tensor_split(group.size(), 1)[group.rank()]
        assert torch.equal(dsp.gather(own, dim=1, size=6, group=group), lazy)
    total = dsp.mean(whole.conj(), dim=0, size=8, group=group)  # each rank holds four of eight
    assert torch.allclose(total, whole.conj().mean(0))


def test_views_that_are_conjugated_or_negated_lazily(ranks):
    ranks(2, _lazy_flags)


def _chunks_into(how: str | int) -> None:
    """Chunks of one shape that arrive in tensors of several sizes: what is kept of a switch by shape knows them apart."""
    group = dist.group.WORLD
    rank = group.rank()
    gathered, split = RankRanges(((0, 2), (4, 6))), RankRanges(((0, 3), (3, 6)))
    with travelling(how, group):
        transport = exchange_of(group).transport
        for size in (8, 7, 8):
            chunks = [torch.randn(5, 2, 6, generator=torch.Generator().manual_seed(size + from_)) for from_ in range(2)]
            into = torch.full((5, size, 3), torch.nan)
            transport.begin([Move(chunks[rank], 1, 2, gathered, split, into)], Label("switch"), at_once=False)()
            for chunk, place in zip(chunks, gathered.parts, strict=True):
                assert torch.equal(into[:, slice(*place)], chunk[:, :, slice(*split.parts[rank])])
            assert into.isnan().sum() == 5 * (size - 4) * 3


@pytest.mark.parametrize("how", ["all-to-all", 1, 1 << 20])
def test_chunks_of_one_shape_into_tensors_of_several_sizes(ranks, how):
    ranks(2, _chunks_into, how)


class _Program(nn.Module):
    """Parameters before, inside and after a region that switches, splits, means and gathers; position-dependent."""

    def __init__(self, T: int, S: int, C: int, group: dist.ProcessGroup | None):
        super().__init__()
        self.before, self.inside, self.inside2, self.after = (nn.Linear(C, C, dtype=torch.float64) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(T, S, 1, dtype=torch.float64))  # a replicated table, sliced in the region
        self.T, self.S, self.group = T, S, group

    def forward(self, x: Tensor, loss: str) -> Tensor:
        T, S, group = self.T, self.S, self.group
        weight = torch.linspace(0.5, 2.0, T * S, dtype=torch.float64).view(T, S, 1)
        x = torch.tanh(self.before(x))
        if group is None:
            x = torch.tanh(self.inside(x) * self.scale)
            x = torch.tanh(self.inside2(x) + x.mean(0, keepdim=True))
            y = self.after(x)
            if loss == "all-reduced":
                return ((y.mean(1)) ** 2 * weight[:, :1]).mean()
            return (y**2 * weight).mean()
        x = dsp.split(x, dim=0, group=group)
        x = torch.tanh(self.inside(x) * dsp.split(self.scale, dim=0, group=group))
        x = dsp.switch(x, gather=0, split=1, size=T, group=group)
        x = dsp.switch(x, gather=1, split=0, size=S, group=group)
        x = torch.tanh(self.inside2(x) + dsp.mean(x, dim=0, size=T, group=group).unsqueeze(0))
        if loss == "gathered":
            return (self.after(dsp.gather(x, dim=0, size=T, group=group)) ** 2 * weight).mean()
        x = dsp.switch(x, gather=0, split=1, size=T, group=group)
        y = self.after(x)
        if loss == "all-reduced":
            return (dsp.mean(y, dim=1, size=S, group=group) ** 2 * weight[:, :1]).mean()
        return dsp.mean_loss(y**2 * dsp.split(weight, dim=1, group=group), group=group)


def _gradients(T: int, S: int, C: int, loss: str) -> tuple[float, float]:
    """The largest relative errors of the loss and of any averaged parameter gradient."""
    torch.manual_seed(T * 100 + S)
    group = dist.group.WORLD
    single = _Program(T, S, C, None)
    parallel = _Program(T, S, C, group)
    parallel.load_state_dict(single.state_dict())
    x = torch.randn(T, S, C, dtype=torch.float64)
    expected = single(x, loss)
    expected.backward()
    value = parallel(x, loss)
    value.backward()
    value = value.detach().clone()
    dist.all_reduce(value)
    error = 0.0
    for name, parameter in parallel.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        reference = single.get_parameter(name).grad
        error = max(error, ((gradient / group.size() - reference).abs().max() / reference.abs().max()).item())
    return abs(value.item() / group.size() - expected.item()) / abs(expected.item()), error


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["gathered", "local shard", "all-reduced"]))
@example(2, 8, 12, "local shard")
@example(4, 1, 6, "gathered")
@example(4, 3, 2, "all-reduced")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_averaged_gradients_equal_one_process(ranks, size, T, S, loss):
    for loss_error, gradient_error in ranks(size, _gradients, T, S, 3, loss):
        assert loss_error < 1e-14
        assert gradient_error < 1e-14


def _second_derivative() -> None:
    group = dist.group.WORLD
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def program(x):
        y = dsp.switch(dsp.split(x, dim=0, group=group), gather=0, split=1, size=3, group=group)
        return dsp.gather(torch.sin(y), dim=1, size=5, group=group)

    (first,) = torch.autograd.grad(program(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x)
    # Partial sums: the mean over ranks of d/dx sum(N cos(x)), each rank's own graph.
    dist.all_reduce(first := first.detach().clone())
    assert torch.allclose(first / group.size(), torch.cos(x), atol=1e-14)
    assert torch.isfinite(second).all()


def test_adjoints_are_differentiable_again(ranks):
    ranks(3, _second_derivative)


def _ledger(T: int, B: int, S: int, C: int) -> None:
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    T_r, S_r = dsp.shard_sizes(T, size)[rank], dsp.shard_sizes(S, size)[rank]
    x = torch.randn(T_r, B, S, C, requires_grad=True)
    with dsp.ledger() as moved:
        y = dsp.switch(x, gather=0, split=2, size=T, group=group, stage="temporal 0")
        y.sum().backward()
        live = moved.calls
    assert live == moved.calls == 2
    rows = {(row.stage, row.operation): (row.calls, row.bytes) for row in moved.rows}
    assert rows == {
        ("temporal 0", "switch"): (1, T_r * B * (S - S_r) * C * 4),
        ("temporal 0", "switch adjoint"): (1, (T - T_r) * B * S_r * C * 4),
    }
    dsp.switch(x, gather=0, split=2, size=T, group=group)
    assert moved.calls == 2, "a closed ledger must not go on counting"


@pytest.mark.parametrize("shape", [(4, 2, 8, 3), (5, 1, 7, 2), (3, 2, 2, 1)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ledger_counts_what_leaves_a_rank(ranks, size, shape):
    ranks(size, _ledger, *shape)


def _mean_loss() -> None:
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    torch.manual_seed(0)
    tokens, mask = torch.randn(7, 3, dtype=torch.float64), torch.rand(7, 1) < 0.5
    tokens[3, 0] = float("nan")
    mask[3] = False
    local, local_mask = (dsp.split(t, dim=0, group=group) for t in (tokens, mask))
    value = dsp.mean_loss(local, group=group, mask=local_mask)
    dist.all_reduce(value)
    assert torch.allclose(value / size, tokens[mask.squeeze(1)].mean(), atol=1e-15)
    empty = local.clone().requires_grad_()
    value = dsp.mean_loss(empty, group=group, mask=torch.zeros_like(local_mask))
    value.backward()
    assert value.item() == 0
    assert (empty.grad == 0).all()
    # Only one rank has tokens that count: the others give 0, not NaN.
    one = torch.full_like(local_mask, rank == 0) & torch.isfinite(local).all(1, keepdim=True)
    value = dsp.mean_loss(local, group=group, mask=one)
    assert value.isfinite()
    assert (value == 0) == (rank != 0)


def test_mean_loss_with_masks(ranks):
    ranks(3, _mean_loss)


def _refusals() -> list[str]:
    mesh = dsp.Mesh(tensor=2)
    group = mesh.group("data")
    x = torch.zeros(2, 4, 3)
    messages = []
    for call in (
        lambda: dsp.switch(x, gather=1, split=-2, size=8, group=group),
        lambda: dsp.switch(x, gather=3, split=0, size=8, group=group),
        lambda: dsp.switch(x, gather=1, split=0, size=12, group=group),
        lambda: dsp.gather(x, dim=0, size=9, group=group),
        lambda: dsp.mean(x.long(), dim=0, size=4, group=group),
        lambda: dsp.split(x, dim=0, group=mesh.group("tensor")),
        lambda: dsp.split(x, dim=0),
        lambda: dsp.switch(x.to_sparse(), gather=1, split=0, size=8, group=group),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the texts are compared below
            call()
        messages.append(str(error.value))
    return messages


def test_refusals_name_the_value_the_rule_and_the_fix(ranks):
    signs = ["both dim 1", "gather=3", "size=12", "size=9", "int64", "tensor group", "no current mesh", "torch.sparse_coo"]
    for messages in ranks(4, _refusals):
        for sign, message in zip(signs, messages, strict=True):
            assert sign in message


def _copies(T: int, B: int, S: int, C: int) -> list[int]:
    """Copies of activation size in a switch there, and in one back."""
    group = dist.group.WORLD
    x = torch.randn(T // group.size(), B, S, C)
    counts = []
    for gather, split, size in ((0, 2, T), (2, 0, S)):
        with torch.profiler.profile(record_shapes=True) as profile:
            x = dsp.switch(x, gather=gather, split=split, size=size, group=group)
        copied = [event for event in profile.events() if event.name in ("aten::copy_", "aten::clone", "aten::cat")]
        counts.append(sum(torch.Size(event.input_shapes[0]).numel() for event in copied) // x.numel())
    return counts


def test_one_copy_a_switch_in_storage_order(ranks):
    # T lies outermost in [T, B, S, C]: its side of a switch is a view.
    assert ranks(2, _copies, 4, 2, 6, 8) == [[1, 1]] * 2


def _graphs_in_flight(rounds: int) -> None:
    """Tensors of several MB, whose memory is reused, in graphs whose forward and backward interleave."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(rounds):
        T, S = (int(torch.randint(5, 9, (), generator=generator)) for _ in range(2))
        whole = torch.randn(T, 2, S, 40000, generator=generator)
        x = dsp.split(whole, dim=0, group=group).clone().requires_grad_()
        y = dsp.switch(x, gather=0, split=2, size=T, group=group)
        z = dsp.switch(y * y, gather=2, split=0, size=S, group=group)
        assert torch.equal(y, whole.tensor_split(size, 2)[rank])
        assert torch.equal(z, x.detach() ** 2)
        graphs.append((x, y, z))
        del y, z
        if len(graphs) == 3:
            x, y, z = graphs.pop(int(torch.randint(0, 3, (), generator=generator)))
            (z * z).sum().backward()
            assert torch.equal(x.grad, x.detach() * 2 * (2 * x.detach() ** 2))
            del x, y, z


@pytest.mark.parametrize("size", [2, 3])
def test_reused_memory_with_several_graphs_in_flight(ranks, size):
    ranks(size, _graphs_in_flight, 12)
