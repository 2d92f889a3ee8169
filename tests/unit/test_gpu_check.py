"""`benchmarks/gpu_check.py` without a GPU: what it says is missing, what it imports, and how it ends jobs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT / "benchmarks") not in sys.path:
    sys.path.append(str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402

# Packages of setup.py, and of benchmarks and tests, that the check does without.
UNUSED = (
    "deepspeed",
    "psutil",
    "mpi4py",
    "av",
    "PIL",
    "tensorboard",
    "megatron",
    "hypothesis",
    "yunchang",
    "apex",
    "flash_attn",
)

IMPORTS = """
import sys
from pathlib import Path

for name in {unused!r}:
    sys.modules[name] = None
sys.path[:0] = ["benchmarks", "tests", "tests/distributed"]
for name in ("one_card", "reshard", "end_to_end", "gpu_check"):
    __import__(name)
import megatron_dsp.data
del sys.modules["one_card"]  # tests/gpu has one too
sys.path[:0] = ["tests/gpu"]
found = sorted(Path("tests/gpu").glob("test_*.py"))
for path in found:
    __import__(path.stem)
print(len(found))
"""


def test_all_that_is_missing_is_said_at_once(monkeypatch):
    for name in ("rich", "pytest"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    packages, *gpu = gpu_check.missing()
    assert "has no rich, pytest;" in packages
    assert "make setup" in packages
    assert gpu == ([] if gpu_check.missing_gpu() is None else [gpu_check.missing_gpu()])


def test_what_the_check_runs_imports_no_other_package():
    script = IMPORTS.format(unused=UNUSED)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_one_gpu_runs_no_benchmark_of_several_ranks():
    assert [(each.name, each.ranks) for each in gpu_check.benchmarks(1, 2.5)] == [("one_card", 1)]
    assert gpu_check.benchmarks(1, 2.5)[0].options == ["--minutes", "2.5"]
    assert [each.ranks for each in gpu_check.benchmarks(6, 2.5)] == [1, 4, 4, 4]


def test_a_job_whose_time_is_over_writes_down_what_it_has_and_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    report = tmp_path / "report"
    script = f"trap 'echo what there is > {report}' INT; sleep 60 & wait; sleep 60"
    begun = time.monotonic()
    assert gpu_check._run(["sh", "-c", script], begun + 3) == gpu_check.OUT_OF_TIME
    assert time.monotonic() - begun < 30
    assert report.read_text() == "what there is\n"


def test_a_job_for_which_there_is_no_time_is_not_begun(capsys):
    assert gpu_check._run([sys.executable, "-c", ""], time.monotonic() - 1) == gpu_check.OUT_OF_TIME
    assert capsys.readouterr().out == ""


def test_the_status_of_a_job_is_its_own():
    assert gpu_check._run([sys.executable, "-c", "raise SystemExit(3)"], time.monotonic() + 60) == 3
