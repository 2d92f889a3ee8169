"""Who may import whom: read from the source, so that imports inside functions and for type checkers count too."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[2]
# Bottom first: a file imports files of its own room and of those before it. CONTRIBUTING.md has the same table.
ORDER = {
    "errors": ["errors", "dtypes", "layout"],
    "job": ["config", "launch", "megatron_groups", "mesh", "placement"],
    "labels": ["reshard.labels"],
    "transport": ["reshard.transport"],
    "reshard": [
        "reshard.agreement",
        "reshard.exchange",
        "reshard.collectives",
        "reshard.primitives",
        "reshard.ledger",
        "reshard.switch_timer",
        "reshard.exposed",
    ],
    "stages": ["reshard.stages"],
    "reshard's public names": ["reshard"],
    "planner": ["planner"],
    "embedded": ["embedded"],
    "tensor": ["tensor"],
    "initialize": ["initialize"],
    "parallelize": ["parallelize"],
    "models": ["models"],
    "pipeline": ["pipeline"],
    "data": ["data"],
    "checkpoint": ["checkpoint"],
    "training": ["training"],
    "public names": [""],
    "command line": ["cli", "__main__"],
}


def read_sources(package: Path) -> dict[str, str]:
    """The source of each module below ``package``, by its name there; that of the package itself is empty."""
    sources = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def find_imports(sources: Mapping[str, str], package: str = "megatron_dsp") -> nx.DiGraph:
    """An arrow from each module to those of the package that it imports."""
    graph = nx.DiGraph()
    graph.add_nodes_from(sources)
    for module, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: a relative import; write the whole name"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                inside = name.removeprefix(package).removeprefix(".") if f"{name}.".startswith(f"{package}.") else None
                if inside is not None:  # a module, or something in one
                    graph.add_edge(module, inside if inside in sources else inside.rpartition(".")[0])
    return graph


def room_of(module: str) -> str | None:
    """The room whose name for a file or folder fits ``module`` best."""
    fits = {name: room for room, names in ORDER.items() for name in names if f"{module}.".startswith(f"{name}.") or not name}
    exact = [name for name in fits if name == module or name]
    # The package itself, and `reshard`, are only their own __init__.
    longest = max(exact, key=len, default=None)
    if longest is None or (longest in ("reshard", "") and longest != module):
        return None
    return fits[longest]


def find_faults(sources: Mapping[str, str]) -> list[str]:
    """Circles, arrows upwards, and modules without a room."""
    graph, rooms = find_imports(sources), list(ORDER)
    faults = [f"{module}: in no room of the table" for module in sources if room_of(module) is None]
    faults += [
        f"a circle: {', '.join(sorted(circle))}" for circle in nx.strongly_connected_components(graph) if len(circle) > 1
    ]
    for module, imported in graph.edges:
        rooms_of = room_of(module), room_of(imported)
        if None not in rooms_of and rooms.index(str(rooms_of[0])) < rooms.index(str(rooms_of[1])):
            faults.append(f"{module} ({rooms_of[0]}) imports {imported} ({rooms_of[1]}), which stands above it")
    return faults


def test_imports_go_one_way():
    assert find_faults(read_sources(ROOT / "megatron_dsp")) == []


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("reshard.exchange", "from megatron_dsp.reshard.stages.overlap import overlap_of", "imports reshard.stages.overlap"),
        ("reshard.exchange", "def f():\n    from megatron_dsp.reshard import Region", "imports reshard (reshard's public"),
        ("reshard.stages.stage", "import megatron_dsp.reshard.stages.region", "a circle: reshard.stages"),
        ("checkpoint.store", "from megatron_dsp.training import loop", "checkpoint.store (checkpoint) imports training.loop"),
        ("layout", "if TYPE_CHECKING:\n    from megatron_dsp.mesh import Mesh", "layout (errors) imports mesh (job)"),
        ("reshard.new_file", "", "reshard.new_file: in no room"),
        ("strange", "", "strange: in no room"),
    ],
)
def test_a_fault_is_found(module, line, fault):
    sources = read_sources(ROOT / "megatron_dsp")
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    assert any(fault in found for found in find_faults(sources))


def test_contributing_has_the_same_table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## Order of rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|`]+?) \| (`[^|]+`) \|", section, re.MULTILINE)
    table = {room: re.findall(r"`([^`]+)`", names) for room, names in rows}
    expected = {room: [name.replace(".", "/") or "megatron_dsp" for name in names] for room, names in ORDER.items()}
    assert table == expected
    assert list(table) == list(expected)
