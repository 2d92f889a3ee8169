"""The main job as users start it: launchers, resume, signals, the picture, and wrong input."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path

import jobs
import psutil
import pytest
from PIL import Image

SCRIPT = "pretrain_scripts/pretrain_video.py"
CONFIG = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[object]:
    """Arguments of a run that takes milliseconds an iteration, on the default clips."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "ds_config.json").write_text(json.dumps(CONFIG))
    sizes = ["--num-frames", 5, "--img-h", 12, "--img-w", 20, "--lr", 1e-3, "--log-interval", 1]
    quiet = ["--sample-steps", 0, "--eval-iters", 0, "--data-cache-path", folder / "cache"]
    return ["--deepspeed_config", folder / "ds_config.json", *sizes, *quiet]


@pytest.fixture(scope="module")
def alone(small) -> dict[int, float]:
    """The losses of 20 iterations in one process."""
    status, output = jobs.run("alone", 1, SCRIPT, *small, "--train-iters", 20, "--micro-batch-size", 4)
    assert status == 0, output
    losses = jobs.losses(output)
    assert list(losses) == list(range(1, 21))
    return losses


@pytest.mark.parametrize(
    ("launcher", "sequence", "data"),
    [
        pytest.param("torchrun", 3, 1, marks=pytest.mark.long),  # others here run under torchrun
        ("deepspeed", 2, 1),
        ("mpirun", 2, 2),
    ],
)
def test_every_launcher_gives_the_same_losses(small, alone, launcher, sequence, data):
    degrees = ["--dynamic-sequence-parallel-size", sequence, "--micro-batch-size", 4 // data]
    status, output = jobs.run(launcher, sequence * data, SCRIPT, *small, "--train-iters", 20, *degrees)
    assert status == 0, output
    assert jobs.losses(output) == pytest.approx(alone, rel=1e-5)
    assert f"started by {launcher}" in output
    assert jobs.value(output, "global batch size")[0] == "4"
    assert jobs.value(output, "consumed samples")[-1] == "80"


@pytest.mark.long
def test_switches_through_mpi_give_the_same_losses(small, alone, tmp_path):
    config = {**CONFIG, "sequence_parallel": {"size": 4, "transport": "mpi"}}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    arguments = [*small, "--deepspeed_config", tmp_path / "ds_config.json", "--micro-batch-size", 4, "--train-iters", 20]
    status, output = jobs.run("mpirun", 4, SCRIPT, *arguments)
    assert status == 0, output
    assert jobs.losses(output) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    "degrees",
    [
        ["--tensor-model-parallel-size", 2, "--dynamic-sequence-parallel-size", 2],
        ["--pipeline-model-parallel-size", 2, "--dynamic-sequence-parallel-size", 2, "--recompute-granularity", "full"],
    ],
    ids=["tensor", "pipe"],
)
@pytest.mark.long
def test_all_axes_give_the_same_losses(small, alone, degrees):
    arguments = [*small, "--train-iters", 20, "--micro-batch-size", 2, "--eval-iters", 1, *degrees]
    status, output = jobs.run("torchrun", 4, SCRIPT, *arguments)
    assert status == 0, output
    assert jobs.losses(output) == pytest.approx(alone, rel=1e-5)
    assert "validation loss at iteration 20" in output
    assert jobs.value(output, "global batch size")[0] == "4"


@pytest.mark.long
def test_all_backends_give_the_same_losses(small, tmp_path):
    """Over four frames, since Ring takes even shards alone."""
    arguments = [*small, "--num-frames", 4, "--micro-batch-size", 4, "--train-iters", 20]
    losses = []
    for name in ("dsp", "ulysses", "ring"):
        config = {**CONFIG, "sequence_parallel": {"size": 2, "backend": name}}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        status, output = jobs.run("torchrun", 2, SCRIPT, *arguments, "--deepspeed_config", tmp_path / f"{name}.json")
        assert status == 0, output
        losses.append(jobs.losses(output))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.long
def test_two_jobs_on_one_host_do_not_meet(small, alone):
    degrees = ["--dynamic-sequence-parallel-size", 2, "--micro-batch-size", 4]
    together = [jobs.start("deepspeed", 2, SCRIPT, *small, "--train-iters", 20, *degrees) for _ in range(2)]
    for status, output in [jobs.finish(job) for job in together]:
        assert status == 0, output
        assert jobs.losses(output) == pytest.approx(alone, rel=1e-5)


def test_resume_is_exact(small, tmp_path):
    arguments = [*small, "--dynamic-sequence-parallel-size", 2, "--micro-batch-size", 2, "--train-iters", 6]
    status, whole = jobs.run("torchrun", 2, SCRIPT, *arguments, "--save", tmp_path, "--save-interval", 3)
    assert status == 0, whole
    assert (tmp_path / "latest").read_text() == "global_step6"
    (tmp_path / "latest").write_text("global_step3")
    status, resumed = jobs.run("torchrun", 2, SCRIPT, *arguments, "--load", tmp_path)
    assert status == 0, resumed
    for name in ("loss", "grad norm", "learning rate", "consumed samples"):
        assert jobs.value(resumed, name) == jobs.value(whole, name)[3:]
    # At another degree it is refused, with what differs named.
    status, output = jobs.run("alone", 1, SCRIPT, *small, "--micro-batch-size", 4, "--load", tmp_path)
    assert status == 1
    assert "sequence 2 -> 1" in output


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("mpirun", marks=pytest.mark.long)])
def test_sigterm_saves_and_stops(small, tmp_path, launcher):
    degrees = ["--dynamic-sequence-parallel-size", 2, "--micro-batch-size", 4]
    job = jobs.start(launcher, 2, SCRIPT, *small, *degrees, "--train-iters", 100000, "--save", tmp_path)
    watchdog = threading.Timer(120, jobs.stop, (job, signal.SIGKILL))
    watchdog.start()
    for line in job.stdout:
        if "iteration        3/" in line:
            if launcher == "mpirun":
                # Open MPI kills its ranks a fraction of a second after it passes a SIGTERM on: one rank gets it instead.
                ranks = [
                    child for child in psutil.Process(job.pid).children(recursive=True) if SCRIPT in " ".join(child.cmdline())
                ]
                ranks[-1].terminate()
            else:
                jobs.stop(job, signal.SIGTERM)
            break
    status, output = jobs.finish(job, timeout=60)
    watchdog.cancel()
    if launcher == "mpirun":
        assert status == 0, output
    tag = (tmp_path / "latest").read_text()
    record = json.loads((tmp_path / tag / "manifest.json").read_text())
    assert 3 <= record["progress"]["iteration"] < 100000
    assert record["progress"]["consumed_samples"] == 4 * record["progress"]["iteration"]


def test_picture_validation_and_tensorboard_without_a_compiler(small, tmp_path):
    no_compiler = tmp_path / "bin"
    no_compiler.mkdir()
    for name in ("sh", "bash", "env", "uname", "nproc"):
        if shutil.which(name):
            (no_compiler / name).symlink_to(shutil.which(name))
    assert shutil.which("cc", path=str(no_compiler)) is None
    more = ["--sample-steps", 2, "--samples-dir", tmp_path, "--eval-iters", 1, "--tensorboard-dir", tmp_path / "tensorboard"]
    degrees = ["--dynamic-sequence-parallel-size", 2, "--micro-batch-size", 4]
    status, output = jobs.run("deepspeed", 2, SCRIPT, *small, "--train-iters", 2, *degrees, *more, PATH=str(no_compiler))
    assert status == 0, output
    assert "validation loss at iteration 2" in output
    # Three samples, each with a row of real frames and two of sampled ones, enlarged three times.
    assert Image.open(tmp_path / "iteration_0000002.png").height == 3 * 3 * 12 * 3
    assert list((tmp_path / "tensorboard").iterdir())
    for figure in ("samples a second", "peak memory a rank"):
        assert figure in output.split("summary:")[1]
    # 12 switches forward and backward of T_r B (S - S_r) C: rank 0 holds 3 of 5 frames and 8 of 15 tokens. Two are of patches.
    there, back = 3 * 4 * (15 - 8) * 4, (5 - 3) * 4 * 8 * 4
    assert f"switch bytes a step and rank: {(5 * 96 + 3 * 4 * 4) * (there + back):,}" in output


def _bad(tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """Wrong arguments, and a sign of the one line that must answer them."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.mp4").write_text("not a video")
    (tmp_path / "typo.json").write_text('{"sequence_parallel": {"sise": 2}}')
    return {
        "degrees": (["--dynamic-sequence-parallel-size", 3], "world size 2 is not a multiple of"),
        "section key": (["--deepspeed_config", tmp_path / "typo.json"], "did you mean 'size'?"),
        "missing data": (["--data-path", tmp_path / "missing"], "missing"),
        "empty data": (["--data-path", tmp_path / "empty"], "no usable video"),
        "text as video": (["--data-path", tmp_path / "text", "--bad-files", "refuse"], "notes.mp4 is not a readable video"),
        "nothing to resume": (["--load", tmp_path / "empty"], "no checkpoint there"),
        "flag": (["--train-iterations", 3], "unrecognized arguments: --train-iterations"),
        "exposed in a pipeline": (
            ["--pipeline-model-parallel-size", 2, "--exposed-communication-interval", 5],
            "--exposed-communication-interval needs whole passes",
        ),
    }


_SHORT = ["degrees", "nothing to resume"]
_LONG = ["exposed in a pipeline", "section key", "missing data", "text as video", "flag"]


@pytest.mark.parametrize("name", [*_SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in _LONG)])
def test_wrong_input_is_answered_with_one_line(small, tmp_path, name):
    arguments, sign = _bad(tmp_path)[name]
    status, output = jobs.run("torchrun", 2, SCRIPT, *small, "--micro-batch-size", 2, *arguments)
    assert status != 0
    lines = [line for line in output.splitlines() if "error:" in line]
    assert len(lines) == 1, output
    assert sign in lines[0]
    assert "failed:\nTraceback" not in output


def test_wrong_input_alone(small, tmp_path):
    arguments, sign = _bad(tmp_path)["empty data"]
    status, output = jobs.run("alone", 1, SCRIPT, *small, "--micro-batch-size", 4, *arguments)
    assert status == 1
    assert len([line for line in output.splitlines() if "error:" in line and sign in line]) == 1
    assert "Traceback" not in output


@pytest.mark.long
def test_fewer_frames_than_ranks(small):
    arguments = ["--micro-batch-size", 4, "--train-iters", 3]
    status, single = jobs.run("alone", 1, SCRIPT, *small, *arguments, "--num-frames", 2)
    assert status == 0, single
    degrees = ["--dynamic-sequence-parallel-size", 3, "--num-frames", 2]
    status, output = jobs.run("torchrun", 3, SCRIPT, *small, *arguments, *degrees)
    assert status == 0, output
    assert jobs.losses(output) == pytest.approx(jobs.losses(single), rel=1e-5)
