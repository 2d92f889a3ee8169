"""The examples run as they are written."""

from __future__ import annotations

import re

import jobs


def test_factorised_attention_equals_one_process():
    status, output = jobs.run("torchrun", 2, "examples/factorised_attention.py")
    assert status == 0, output
    assert "sequence=2" in output
    (step, *_, last) = re.findall(r"step \d  loss (\S+)  in one process (\S+)", output)
    assert float(last[0]) < float(step[0])
    assert abs(float(last[0]) - float(last[1])) < 1e-10
    assert float(re.search(r"averaged gradients (\S+)", output)[1]) < 1e-12


def test_the_readme_example(tmp_path):
    code, *_ = re.findall(r"```python\n(.*?)```", (jobs.ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "train.py").write_text(code)
    losses = []
    for launcher, size in (("alone", 1), ("torchrun", 2)):
        status, output = jobs.run(launcher, size, tmp_path / "train.py")
        assert status == 0, output
        losses.append(float(re.search(r"loss (\S+)", output)[1]))
    assert abs(losses[0] - losses[1]) < 1e-6
