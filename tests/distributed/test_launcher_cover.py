"""The main job under every pair of launcher, degrees, ZeRO stage, accumulation, clipping and sizes: 20 iterations each.

Takes minutes: `make test-long`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import jobs
import pytest

pytestmark = pytest.mark.long

SCRIPT = "pretrain_scripts/pretrain_video.py"
FACTORS = {
    "launcher": ["alone", "torchrun", "deepspeed", "mpirun"],
    "sequence": [1, 2, 3],
    "data": [1, 2],
    "zero": [0, 1, 2, 3],
    "accumulation": [1, 2],
    "clip": [0.0, 0.3],
    "frames": [6, 5],
    "size": [(12, 24), (12, 20)],  # 18 and 15 spatial tokens
}


def _possible(case: dict[str, object]) -> bool:
    return case.get("launcher") != "alone" or all(case.get(axis, 1) == 1 for axis in ("sequence", "data"))


def _pairs(case: dict[str, object]) -> set[frozenset[tuple[str, object]]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def _cover() -> list[dict[str, object]]:
    """Cases that together have every possible pair of values, chosen greedily; the same at every call."""
    everything = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    everything = [case for case in everything if _possible(case)]
    left = set().union(*(_pairs(case) for case in everything))
    cases = []
    while left:
        case = max(everything, key=lambda case: len(_pairs(case) & left))
        cases.append(case)
        left -= _pairs(case)
    return cases


def _run(folder: Path, case: dict[str, object]) -> dict[int, float]:
    config = {
        "train_batch_size": 4,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": case["clip"],
        "zero_optimization": {"stage": case["zero"]},
        "sequence_parallel": {"size": case["sequence"]},
    }
    (folder / "ds_config.json").write_text(json.dumps(config))
    height, width = case["size"]
    status, output = jobs.run(
        case["launcher"], case["sequence"] * case["data"], SCRIPT, "--deepspeed_config", folder / "ds_config.json",
        "--micro-batch-size", 4 // (case["data"] * case["accumulation"]), "--num-frames", case["frames"],
        "--img-h", height, "--img-w", width, "--lr", 1e-3, "--train-iters", 20, "--log-interval", 1,
        "--sample-steps", 0, "--eval-iters", 0, "--data-cache-path", folder / "cache",
    )  # fmt: skip
    assert status == 0, output
    return jobs.losses(output)


@pytest.fixture(scope="module")
def references() -> dict[tuple[object, ...], dict[int, float]]:
    """The losses of one process in ZeRO stage 0, by what they depend on."""
    return {}


@pytest.mark.parametrize("case", _cover(), ids=lambda case: "-".join(map(str, case.values())))
def test_losses_equal_one_process(case, references, tmp_path):
    key = case["clip"], case["frames"], case["size"]
    if key not in references:
        single = {"launcher": "alone", "sequence": 1, "data": 1, "zero": 0, "accumulation": 1}
        references[key] = _run(tmp_path, {**case, **single})
    losses = _run(tmp_path, case)
    assert len(losses) == 20
    assert losses == pytest.approx(references[key], rel=1e-5)
