"""docs/without_deepspeed.md: DDP, FSDP2 and accelerate over data and sequence axes, against one process."""

from __future__ import annotations

import re

import jobs
import pytest

DOCS = jobs.ROOT / "docs" / "without_deepspeed.md"


# The examples compare all weights with those of one process themselves, to 1e-10, and fail where they differ.
@pytest.mark.parametrize(
    ("launcher", "size", "sequence"),
    [
        ("torchrun", 4, 2),
        pytest.param("alone", 1, 1, marks=pytest.mark.long),
        pytest.param("mpirun", 3, 3, marks=pytest.mark.long),
        pytest.param("torchrun", 4, 1, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("example", ["ddp.py", pytest.param("fsdp2.py", marks=pytest.mark.long)])
def test_weights_are_those_of_one_process(example, launcher, size, sequence):
    status, output = jobs.run(launcher, size, f"examples/{example}", "--sequence", sequence)
    assert status == 0, output
    (found,) = re.findall(r"^Mesh\(.*?sequence=(\d+), data=(\d+).*differ from one process by (\S+), relative$", output, re.M)
    assert found[:2] == (str(sequence), str(size // sequence))
    assert float(found[2]) < 1e-10


@pytest.mark.long
def test_accelerate_has_the_losses_of_one_process(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    (code,) = re.findall(r"```python\n(import torch\nfrom accelerate.*?)```", DOCS.read_text(), flags=re.DOTALL)
    (tmp_path / "train.py").write_text(code)
    losses = []
    for launcher, size in (("alone", 1), ("torchrun", 2), ("torchrun", 4), ("mpirun", 2)):
        status, output = jobs.run(launcher, size, tmp_path / "train.py")
        assert status == 0, output
        losses.append([float(loss) for loss in re.findall(r"^loss (\S+)$", output, re.M)])
        assert len(losses[0]) == 8
        assert losses[-1] == pytest.approx(losses[0], rel=1e-6, abs=0)
