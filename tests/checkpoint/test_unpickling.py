"""Pickles that would run code are refused, and not run."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron_dsp.checkpoint import unpickling
from megatron_dsp.errors import UsageError

_OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
_MODEL = "mp_rank_00_model_states.pt"
_TENSORS = OrderedDict(a=torch.arange(5.0), b=torch.ones(2, 3, dtype=torch.bfloat16), c=torch.tensor([True]))


class _Evaluates(planted.Makes):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({self.path!r})",)


def _file(path: Path, made: Path, kind: str) -> str:
    """Write a file of a kind of attack; a sign of why it is refused."""
    if kind == "function":
        torch.save({"module": _TENSORS, "more": [planted.Makes(made)]}, path)
        return "posix.mkdir"
    if kind == "eval":
        torch.save({"module": _Evaluates(made)}, path)
        return "eval"
    if kind == "newer protocol":  # its globals are named by texts, which need not stand beside each other
        torch.save(planted.Makes(made), path, pickle_protocol=4)
        return "PROTO"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(planted.Makes(made)))
        return "no zip archive"
    if kind == "legacy":
        torch.save(planted.Makes(made), path, _use_new_zipfile_serialization=False)
        return "no zip archive"
    if kind == "old operation":
        planted.archive(path, f"(S'{made}'\niposix\nmkdir\n.".encode())
        return "STRING, which torch.save"
    if kind == "two words":  # the name of a module and that of what is in it, both after the opening bytes of protocol 2
        planted.archive(
            path, b"\x80\x02cposix\nmkdir\nX" + len(str(made)).to_bytes(4, "little") + str(made).encode() + b"\x85R."
        )
        return "posix.mkdir"
    if kind == "prefix":  # two pickles, one behind the other
        first = io.BytesIO()
        torch.save({}, first)
        path.write_bytes(pickle.dumps(planted.Makes(made)) + first.getvalue())
        return "no zip archive"
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    return "TorchScript"


_KINDS = "function", "eval", "newer protocol", "plain pickle", "legacy", "old operation", "two words", "prefix", "TorchScript"


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("name", [_MODEL, _OPTIMIZER])
def test_what_runs_code_is_refused_unrun(tmp_path, name, kind):
    path, made = tmp_path / name, tmp_path / "made"
    sign = _file(path, made, kind)
    for read in (unpickling.check_globals, unpickling.load):
        with pytest.raises(UsageError, match=r"is not opened: ") as error:
            read(path)
        assert str(path) in str(error.value)
        assert sign in str(error.value)
    assert not made.exists()
    if kind != "TorchScript":
        unpickle = torch.load if kind != "prefix" else lambda path, **_: pickle.loads(path.read_bytes())
        with contextlib.suppress(RuntimeError):  # that comes too late
            unpickle(path, weights_only=False)
        assert made.exists(), "the file would have run nothing, and shows nothing"


def test_listed_globals_are_put_to_no_other_use(tmp_path):
    """Not each use of a listed class shows in the globals: a pickle can set what belongs to the class itself."""
    path = tmp_path / _MODEL
    torch.save({"module": _TENSORS}, path)
    planted.set_on_class(path)
    assert "deepspeed.utils.tensor_fragment.fragment_address" in unpickling.check_globals(path)
    with pytest.raises(UsageError, match="is refused by torch's restricted unpickler"):
        unpickling.load(path)
    assert not hasattr(fragment_address, "planted")
    torch.load(path, weights_only=False)
    assert fragment_address.planted == 1, "the file would have done nothing, and shows nothing"
    del fragment_address.planted


def test_damaged_archives(tmp_path):
    path = tmp_path / _MODEL
    torch.save({"module": _TENSORS}, path)
    content = path.read_bytes()
    for damaged in (b"", content[:3], content[: len(content) // 2], content[:-30], b"PK\x03\x04" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is not opened"):
            unpickling.check_globals(path)
    for data in (b"", b"\x80\x02", b"\x80\x02}", b"\xff"):
        planted.archive(path, data)
        with pytest.raises(UsageError, match="is not opened"):
            unpickling.check_globals(path)


def test_each_kind_of_file_has_its_own_list(tmp_path):
    state = {
        "loss_scaler": LossScaler(1.0),
        "dynamic": DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, dtype=torch.half),
        "zero_stage": ZeroStageEnum.gradients,
        "mappings": [OrderedDict(weight=fragment_address(numel=5, start=0))],
        "tensors": _TENSORS,
    }
    path = tmp_path / _OPTIMIZER
    torch.save(state, path)
    for mmap in (False, True):
        found = unpickling.load(path, mmap=mmap)
        assert found["dynamic"].__dict__ == state["dynamic"].__dict__
        assert (found["zero_stage"], found["mappings"]) == (state["zero_stage"], state["mappings"])
        assert all(torch.equal(found["tensors"][name], value) for name, value in _TENSORS.items())
    for name in ("layer_03-model_00-model_states.pt", _MODEL, "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        (tmp_path / name).write_bytes(path.read_bytes())
        with pytest.raises(
            UsageError, match=r"wants .*loss_scaler\.LossScaler, deepspeed\.runtime\.zero\.config\.ZeroStageEnum"
        ):
            unpickling.load(tmp_path / name)
    (tmp_path / "weights.pt").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="none of DeepSpeed's checkpoint files has such a name"):
        unpickling.load(tmp_path / "weights.pt")


def test_nothing_listed_reaches_further():
    """No listed global is one that calls or looks up what it is given by name."""
    names = set().union(*unpickling._ALLOWED.values())
    assert not [
        name for name in names if name.startswith(("builtins.", "os.", "posix.", "operator.", "functools.", "importlib."))
    ]
    assert "torch.storage._load_from_bytes" not in names  # which unpickles anything
