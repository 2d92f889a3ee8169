"""From `dsp.switch` to the collective: how many functions of ours a switch goes through, which docs/architecture.md lists."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import megatron_dsp as dsp
from megatron_dsp import mesh as meshes
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.transport import torch_transport
from megatron_dsp.training.fake_world import fake_world

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_dsp"
MOST_FUNCTIONS, MOST_FILES = 14, 5


def _functions_on_the_way() -> list[tuple[str, str]]:
    """(function, file) of ours in the order of their calls, from the public one until torch is asked for the collective."""
    found: dict[CodeType, tuple[str, str]] = {}
    collectives = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal collectives
        if event == "c_call" and argument.__name__ in ("all_to_all_single", "alltoall_base"):
            collectives += 1
        path = Path(frame.f_code.co_filename)
        if event == "call" and not collectives and PACKAGE in path.parents:
            found.setdefault(frame.f_code, (frame.f_code.co_name, str(path.relative_to(PACKAGE))))

    with fake_world(8, rank=0):
        mesh = dsp.initialize({"sequence_parallel": {"size": 8}})
        group = mesh.group("sequence")
        # The route of CUDA tensors, on the CPU.
        exchange_of(group).transport._find_route = lambda moves: torch_transport.AllToAll(moves, group.rank())
        x = torch.randn(2, 3, 8, 4, requires_grad=True)
        try:
            dsp.switch(x, gather=0, split=2, size=16)  # what depends on shapes alone is found here, and kept
            sys.setprofile(note)
            dsp.switch(x, gather=0, split=2, size=16)
        finally:
            sys.setprofile(None)
            meshes.set_current(None)
    assert collectives == 1
    return list(found.values())


def test_a_switch_takes_few_functions_in_few_files():
    found = _functions_on_the_way()
    assert len(found) <= MOST_FUNCTIONS, found
    assert len({file for _, file in found}) <= MOST_FILES, found


def test_the_docs_list_them():
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## The way of a switch\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w/]+\.py)` \|", section, re.MULTILINE)
    assert [(name.rpartition(".")[2], file) for name, file in rows] == _functions_on_the_way()
