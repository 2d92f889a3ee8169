"""What the CUDA paths do on this machine's GPUs: tests on one, and on two and more also NCCL and the benchmarks.

    python benchmarks/gpu_check.py        # or make gpu-check

Writes `benchmarks/results/gpu-check-<card>-<number of GPUs>.json`: the machine, each test's outcome, and the benchmarks' rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TESTS = ["tests/gpu", "tests/distributed/test_overlap.py"]
CHOSEN = "gpu or cuda or side_stream"  # of these: all of the first, and of the others those that need a GPU
HOURS = 1  # that the tests, or a benchmark, may take


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="the folder of the JSON file")
    arguments = parser.parse_args()
    lacking = missing()
    if lacking is not None:
        print(f"gpu_check: {lacking}", file=sys.stderr)
        return 1
    found = machine()
    with tempfile.TemporaryDirectory() as folder:
        tests, status = run_tests(Path(folder) / "tests.xml")
        found |= {"tests": tests, "tests_exit_status": status, "benchmarks": {}}
        if len(found["cards"]) > 1:
            found["benchmarks"] = run_benchmarks(ranks_of(len(found["cards"])), Path(folder))
    card = re.sub(r"[^a-z0-9]+", "-", found["cards"][0].lower()).strip("-")
    path = arguments.output / f"gpu-check-{card}-{len(found['cards'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    show(found, path)
    return int(status != 0 or any(benchmark["exit_status"] for benchmark in found["benchmarks"].values()))


def missing() -> str | None:
    """What this Python lacks for the check, and where to get it; None: nothing."""
    for name in ("torch", "pytest", "rich", "deepspeed"):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}; make setup installs all, or name a Python that has it: make PYTHON=..."
    import torch

    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA (https://pytorch.org/get-started)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU; it needs one, and NVIDIA's driver for it"
    return None


def machine() -> dict[str, Any]:
    """Cards, driver, versions, date and commit."""
    import torch

    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": len((_output("git", "status", "--porcelain") or "").splitlines()),
        "cards": [card.name for card in cards],
        "compute_capability": f"{cards[0].major}.{cards[0].minor}",
        "memory_bytes": [card.total_memory for card in cards],
        "driver": (drivers or "unknown").partition("\n")[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_tests(report: Path) -> tuple[list[dict[str, Any]], int]:
    """Each test's name, outcome, seconds, and what it says; pytest's exit status."""
    # Only the older family of reports has the tests' own properties: the names of kernels.
    options = ["-k", CHOSEN, "-o", "junit_family=xunit1", f"--junit-xml={report}"]
    status = _run([sys.executable, "-m", "pytest", *TESTS, *options])
    return (_tests(report) if report.exists() else []), status


def _tests(report: Path) -> list[dict[str, Any]]:
    tests = []
    for case in ET.parse(report).iter("testcase"):
        test: dict[str, Any] = {
            "name": f"{case.get('file') or case.get('classname')}::{case.get('name')}",
            "outcome": "passed",
            "seconds": float(case.get("time", "0")),
        }
        for tag in ("skipped", "failure", "error"):
            for element in case.findall(tag):
                test |= {"outcome": {"failure": "failed"}.get(tag, tag), "message": element.get("message", "")}
        properties = {each.get("name"): each.get("value") for each in case.iter("property")}
        tests.append(test | ({"properties": properties} if properties else {}))
    return tests


def ranks_of(gpus: int) -> int:
    """Of the benchmarks, whose shapes are powers of two: as many GPUs as the largest one in their number."""
    return 1 << (gpus.bit_length() - 1)


def run_benchmarks(ranks: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Exit status, seconds and rows of each, under torchrun."""
    results: dict[str, dict[str, Any]] = {}
    for name, script, options in (
        ("reshard", "benchmarks/reshard.py", []),
        ("end_to_end check", "benchmarks/end_to_end.py", ["--check"]),
        ("end_to_end", "benchmarks/end_to_end.py", ["--preset", "720m"]),
    ):
        rows = folder / f"{name}.json"
        begun = time.monotonic()
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        status = _run([sys.executable, *launcher, script, *options, "--output", str(rows)])
        results[name] = {
            "ranks": ranks,
            "exit_status": status,
            "seconds": round(time.monotonic() - begun, 1),
            "rows": json.loads(rows.read_text()) if rows.exists() else [],
        }
    return results


def _run(command: list[str]) -> int:
    """The exit status, 124 where it took too long. Nothing of the job is left running."""
    print("+", *command, flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True)
    try:
        return job.wait(timeout=HOURS * 3600)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def show(found: dict[str, Any], path: Path) -> None:
    """The tests that did not pass, how many did, and the benchmarks."""
    from rich.console import Console
    from rich.table import Table

    cards = f"{len(found['cards'])} x {found['cards'][0]}"
    title = f"{cards}, driver {found['driver']}, CUDA {found['cuda']}, torch {found['torch']}"
    table = Table("what", "outcome", "seconds", title=title)
    passed = [test for test in found["tests"] if test["outcome"] == "passed"]
    table.add_row(f"{len(passed)} of {len(found['tests'])} tests", "passed", f"{sum(test['seconds'] for test in passed):.0f}")
    reasons: dict[str, int] = {}
    for test in found["tests"]:
        if test["outcome"] == "skipped":
            reasons[test["message"]] = reasons.get(test["message"], 0) + 1
        elif test["outcome"] != "passed":
            table.add_row(test["name"], test["outcome"], f"{test['seconds']:.0f}", style="red")
    for reason, count in reasons.items():
        table.add_row(f"{count} tests", f"skipped: {reason}", "")
    if found["tests_exit_status"]:
        table.add_row("pytest", f"exit status {found['tests_exit_status']}", "", style="red")
    for name, benchmark in found["benchmarks"].items():
        outcome = f"exit status {benchmark['exit_status']}" if benchmark["exit_status"] else f"{len(benchmark['rows'])} rows"
        style = "red" if benchmark["exit_status"] else ""
        table.add_row(f"{name}, {benchmark['ranks']} ranks", outcome, f"{benchmark['seconds']:.0f}", style=style)
    Console().print(table)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
