"""Who is where, and which groups cross hosts needlessly, for layouts of ranks over hosts that need no processes."""

from __future__ import annotations

import pytest

from megatron_dsp import UsageError
from megatron_dsp.mesh import RankGrid
from megatron_dsp.placement import Placement


def block(hosts: int, ranks_per_host: int) -> list[str]:
    return [f"host{rank // ranks_per_host}" for rank in range(hosts * ranks_per_host)]


def cyclic(hosts: int, ranks_per_host: int) -> list[str]:
    return [f"host{rank % hosts}" for rank in range(hosts * ranks_per_host)]


def placed(hosts: list[str], **degrees: int) -> Placement:
    return Placement(RankGrid(len(hosts), **degrees), hosts)


@pytest.mark.parametrize(
    ("hosts", "degrees"),
    [
        (block(2, 4), {"sequence": 4}),
        (block(2, 4), {"sequence": 2, "tensor": 2}),
        (block(2, 4), {"sequence": 8}),  # needs both hosts
        (block(2, 4), {"sequence": 4, "tensor": 2}),
        (block(64, 8), {"sequence": 8, "pipe": 2}),
        (block(128, 8), {"sequence": 16, "tensor": 2, "pipe": 2}),  # 32 ranks, four hosts
        (block(3, 2), {"sequence": 3}),  # no order of ranks keeps three on two hosts of two from crossing
        (cyclic(2, 4), {}),
        (cyclic(1, 8), {"sequence": 4, "tensor": 2}),
        (cyclic(4, 2), {"sequence": 1, "pipe": 4}),
        (["laptop"], {}),
    ],
)
def test_what_must_cross_hosts_or_does_not_is_no_warning(hosts, degrees):
    assert placed(hosts, **degrees).warnings() == []


@pytest.mark.parametrize(
    ("hosts", "degrees", "axes", "fix"),
    [
        (cyclic(2, 4), {"sequence": 4}, ["sequence"], "--map-by ppr:4:node"),
        (cyclic(2, 4), {"tensor": 2}, ["tensor"], "srun --distribution=block"),
        (cyclic(2, 4), {"tensor": 2, "sequence": 2}, ["tensor"], "ppr:4:node"),  # sequence groups: (0 2) on one host
        (cyclic(64, 8), {"tensor": 2, "sequence": 4}, ["tensor", "sequence"], "-ppn 8"),
        (cyclic(4, 4), {"sequence": 8}, ["sequence"], "ppr:4:node"),  # needs two hosts, lies on four
        (block(3, 8), {"sequence": 6}, ["sequence"], "tensor x sequence divides the 8 ranks"),
        (block(3, 8), {"tensor": 3}, ["tensor"], "the degree divides the 8 ranks"),
        (block(3, 8), {"tensor": 2, "sequence": 3}, ["sequence"], "tensor x sequence divides the 8 ranks"),
        (block(15, 8), {"sequence": 15}, ["sequence"], "or is a multiple of them"),  # needs two hosts, some lie on three
    ],
)
def test_a_needless_crossing_is_one_line_with_its_fix(hosts, degrees, axes, fix):
    warnings = placed(hosts, **degrees).warnings()
    assert [warning.split()[0] for warning in warnings] == axes
    for warning in warnings:
        assert "cross hosts needlessly" in warning
        assert fix in warning
        assert "\n" not in warning


def test_the_widest_group_is_shown():
    (warning,) = placed(block(3, 8), sequence=6).warnings()
    assert "sequence 6 needs 1 of the hosts with 8 ranks each, but the group of ranks 6-11 lies on 2" in warning
    (warning,) = placed(cyclic(64, 8), sequence=8).warnings()
    assert "the group of ranks 0-7 lies on 8" in warning


def test_unequal_hosts_are_named():
    warnings = placed(["big"] * 3 + ["small"], sequence=2).warnings()
    assert warnings[0].startswith("hosts have unequal numbers of ranks: big has 3, small has 1")
    assert warnings[1].startswith("sequence groups cross hosts needlessly")
    assert len(placed(["big"] * 3 + ["small"]).warnings()) == 1


def test_a_row_for_each_rank():
    lines = placed(["one", "two", "one", "two"], sequence=2).table().splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "host", "local", "rank", "pipe", "data", "sequence", "tensor"],
        ["0", "one", "0", "0", "0", "0", "0"],
        ["1", "two", "0", "0", "0", "1", "0"],
        ["2", "one", "1", "0", "1", "0", "0"],
        ["3", "two", "1", "0", "1", "1", "0"],
    ]
    assert len({line.index("one") for line in lines if "one" in line} | {lines[0].index("host")}) == 1


def test_a_row_for_each_host_of_512_ranks():
    lines = placed(block(64, 8), sequence=8, pipe=2).table().splitlines()
    assert lines[0].split() == ["host", "ranks", "pipe", "data", "sequence", "tensor"]
    assert lines[1].split() == ["host0", "0-7", "0", "0", "0-7", "0"]
    assert lines[64].split() == ["host63", "504-511", "1", "31", "0-7", "0"]
    scattered = placed(cyclic(64, 8), sequence=8).table().splitlines()
    assert scattered[1].split() == ["host0", "0", "64", "...", "448", "0", "0", "8", "...", "56", "0", "0"]


def test_every_rank_has_a_host():
    with pytest.raises(UsageError, match="3 hosts given for 4 ranks"):
        Placement(RankGrid(4), ["a", "b", "c"])
