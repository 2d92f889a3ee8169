"""What the CUDA paths do on this machine's GPUs: tests and `one_card.py` on one, on two and more also NCCL and the benchmarks.

    python benchmarks/gpu_check.py --minutes 10        # or make gpu-check ARGS="--minutes 10"

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
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TESTS = "tests/gpu"
# What the tests and the benchmarks import, the package's own imports among it.
PACKAGES = ("torch", "numpy", "pydantic", "safetensors", "rich", "pytest")
ONE_CARD_MINUTES = 5  # that `one_card.py` may take, or a third of all
GRACE = 20  # seconds that a job gets to write down what it has, when its time is over
OUT_OF_TIME = 124  # the exit status of a job whose time was over, as that of timeout(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="the folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=60, help="that all may take; what is not through then is ended")
    arguments = parser.parse_args()
    lacking = missing()
    for each in lacking:
        print(f"gpu_check: {each}", file=sys.stderr)
    if lacking:
        return 1
    stop = time.monotonic() + 60 * arguments.minutes
    found = machine()
    with tempfile.TemporaryDirectory() as name:
        folder, one_card = Path(name), min(ONE_CARD_MINUTES, arguments.minutes / 3)
        tests, status = run_tests(folder / "tests.xml", stop - 60 * one_card - 2 * GRACE)  # it starts, and may be ended, too
        found |= {"tests": tests, "tests_exit_status": status, "benchmarks": {}}
        for benchmark in benchmarks(len(found["cards"]), one_card):
            found["benchmarks"][benchmark.name] = run_benchmark(benchmark, folder, stop)
    card = re.sub(r"[^a-z0-9]+", "-", found["cards"][0].lower()).strip("-")
    path = arguments.output / f"gpu-check-{card}-{len(found['cards'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    show(found, path)
    return int(status != 0 or any(benchmark["exit_status"] for benchmark in found["benchmarks"].values()))


def missing() -> list[str]:
    """All that this Python lacks for the check, and where to get it."""
    lacking = []
    packages = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if packages:
        where = "make setup installs all, or name a Python that has them: make PYTHON=..."
        lacking.append(f"{sys.executable} has no {', '.join(packages)}; {where}")
    no_gpu = missing_gpu() if "torch" not in packages else None
    return lacking if no_gpu is None else [*lacking, no_gpu]


def missing_gpu() -> str | None:
    """Why torch has no GPU here, and what to do; None: it has one."""
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


def run_tests(report: Path, stop: float) -> tuple[list[dict[str, Any]], int]:
    """Each test's name, outcome, seconds, and what it says; pytest's exit status. Ended at ``stop``, of `time.monotonic`."""
    # Only the older family of reports has the tests' own properties: the names of kernels.
    options = ["-o", "junit_family=xunit1", f"--junit-xml={report}"]
    status = _run([sys.executable, "-m", "pytest", TESTS, *options], stop)
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


class Benchmark(NamedTuple):
    """A script of this folder with its options, on so many GPUs."""

    name: str
    script: str
    options: list[str]
    ranks: int


def benchmarks(gpus: int, one_card_minutes: float) -> list[Benchmark]:
    """Those that so many GPUs can run, in their order."""
    found = [Benchmark("one_card", "one_card.py", ["--minutes", f"{one_card_minutes:g}"], 1)]
    if gpus > 1:
        ranks = ranks_of(gpus)
        found += [
            Benchmark("reshard", "reshard.py", [], ranks),
            Benchmark("end_to_end check", "end_to_end.py", ["--check"], ranks),
            Benchmark("end_to_end", "end_to_end.py", ["--preset", "720m"], ranks),
        ]
    return found


def run_benchmark(benchmark: Benchmark, folder: Path, stop: float) -> dict[str, Any]:
    """Exit status, seconds and rows; over several ranks, under torchrun. Ended at ``stop``, of `time.monotonic`."""
    rows = folder / f"{benchmark.name}.json"
    begun = time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={benchmark.ranks}"]
    script = [f"benchmarks/{benchmark.script}", *benchmark.options, "--output", str(rows)]
    status = _run([sys.executable, *(launcher if benchmark.ranks > 1 else []), *script], stop)
    return {
        "ranks": benchmark.ranks,
        "exit_status": status,
        "seconds": round(time.monotonic() - begun, 1),
        "rows": json.loads(rows.read_text()) if rows.exists() else [],
    }


def _run(command: list[str], stop: float) -> int:
    """The exit status, `OUT_OF_TIME` where it was not through at ``stop``. Nothing of the job is left running."""
    seconds = stop - time.monotonic()
    if seconds <= 0:
        return OUT_OF_TIME
    print("+", *command, flush=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    job = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, start_new_session=True, preexec_fn=_heed_interrupts
    )
    try:
        return job.wait(timeout=max(0.0, seconds - GRACE))
    except subprocess.TimeoutExpired:
        # pytest writes its report then.
        job.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            job.wait(timeout=min(GRACE, seconds))
        return OUT_OF_TIME
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _heed_interrupts() -> None:
    """Also where this was started in the background, which shells do with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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
        table.add_row("pytest", _in_words(found["tests_exit_status"]), "", style="red")
    for name, benchmark in found["benchmarks"].items():
        rows, status, ranks = len(benchmark["rows"]), benchmark["exit_status"], benchmark["ranks"]
        outcome = f"{rows} rows, {_in_words(status)}" if status else f"{rows} rows"
        what = f"{name}, {ranks} rank{'s' * (ranks > 1)}"
        table.add_row(what, outcome, f"{benchmark['seconds']:.0f}", style="red" if status else "")
    Console().print(table)
    print(path)


def _in_words(status: int) -> str:
    return "its time was over: --minutes gives more" if status == OUT_OF_TIME else f"exit status {status}"


if __name__ == "__main__":
    sys.exit(main())
