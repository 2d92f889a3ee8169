"""Damage of each kind, to each file of a checkpoint, is found and named; nothing of the checkpoint is loaded for it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import plain
import pytest

from megatron_dsp.checkpoint import manifest
from megatron_dsp.errors import UsageError


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    plain.save(tmp_path, 1)
    return tmp_path / "global_step1"


def _delete(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip(path: Path) -> None:
    """One bit, anywhere."""
    content, draws = bytearray(path.read_bytes()), random.Random(path.name)
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    path.write_bytes(content)


_SIGNS = {_delete: "missing", _cut: "cut off", _empty: "cut off", _lengthen: "too long", _flip: "changed"}


@pytest.mark.parametrize("damage", _SIGNS)
@pytest.mark.parametrize("name", [*plain.FILES, *plain.OURS])
def test_each_file_is_named(checkpoint, name, damage):
    assert manifest.check(checkpoint) == []
    damage(checkpoint / name)
    (problem,) = manifest.check(checkpoint)
    assert problem.startswith(f"{name} ")
    assert _SIGNS[damage] in problem
    # By sizes alone, everything but changed bytes is found.
    assert manifest.check(checkpoint, hashes=False) == ([] if damage is _flip else [problem])


def test_all_damaged_files_are_named_at_once(checkpoint):
    damages = dict(zip([*plain.FILES, *plain.OURS], 2 * list(_SIGNS), strict=True))
    for name, damage in damages.items():
        damage(checkpoint / name)
    problems = manifest.check(checkpoint)
    assert sorted(problem.split(" ")[0] for problem in problems) == sorted(damages)


def test_each_byte_of_the_manifest_counts(checkpoint):
    path = checkpoint / manifest.NAME
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        (problem,) = manifest.check(checkpoint, hashes=False)
        assert problem.startswith(f"{manifest.NAME} "), place
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert manifest.check(checkpoint, hashes=False) == [f"{manifest.NAME} was changed: it is no manifest any more"]
    path.unlink()
    assert manifest.check(checkpoint) == [f"{manifest.NAME} is missing"]
    path.mkdir()
    assert manifest.check(checkpoint) == [f"{manifest.NAME} cannot be read (Is a directory)"]


def test_a_newer_manifest_is_not_taken_for_a_damaged_one(checkpoint):
    (checkpoint / manifest.NAME).write_text(json.dumps({"format": manifest.FORMAT + 1, "pieces": []}))
    (problem,) = manifest.check(checkpoint)
    assert "is of format 2, and this version of megatron_dsp knows 1; use a newer one" in problem


def test_other_texts_are_no_manifests(checkpoint):
    for text in ("", "[]", "null", '"text"', "{}", '{"format": "1"}', '{"format": 1, "sha256": ""}', '{"format": true}'):
        (checkpoint / manifest.NAME).write_text(text)
        assert "was changed" in manifest.check(checkpoint)[0]


def test_what_was_written_is_read(checkpoint):
    found = manifest.read(checkpoint)
    assert found == plain.record(found.files, 1)
    assert found.files.keys() == {*plain.FILES, *plain.OURS}


@pytest.mark.parametrize("name", ["../other/file.pt", "/etc/hostname"])
def test_a_manifest_lists_its_own_files_alone(checkpoint, name):
    files = manifest.read(checkpoint).files
    manifest.write(checkpoint, plain.record({**files, name: files[plain.OURS[0]]}, 1))
    with pytest.raises(UsageError, match="outside of the checkpoint"):
        manifest.read(checkpoint)


def test_files_that_deepspeed_would_take_for_its_own(checkpoint):
    (checkpoint / "notes.txt").write_text("anything may lie beside")
    assert manifest.check(checkpoint) == []
    shutil.copy(checkpoint / plain.FILES[0], checkpoint / "mp_rank_01_model_states.pt")
    assert manifest.check(checkpoint) == ["mp_rank_01_model_states.pt does not belong there"]


def test_the_hash_is_that_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_PIECE", 7)
    (tmp_path / "file").write_bytes(b"abc" * 9)
    # sha256sum says so.
    assert manifest.sha256(tmp_path / "file") == "ddd23773d8724b8a40749046d8e3414402507a21a1ccc522653197b0803d268b"


@pytest.mark.parametrize("parts", [1, 3, 8])
def test_files_are_divided_by_their_bytes(parts):
    draws = random.Random(parts)
    sizes = {f"file{number}": draws.randrange(1000) for number in range(50)}
    shares = manifest.divide(sizes, parts)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    of_parts = [sum(sizes[name] for name in share) for share in shares]
    assert max(of_parts) - min(of_parts) < 1000
    assert manifest.divide(dict(reversed(sizes.items())), parts) == shares  # whatever their order
