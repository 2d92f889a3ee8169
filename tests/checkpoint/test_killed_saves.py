"""A save that is killed -9 right before any of its changes to the file system leaves a good checkpoint, and none that misleads.

The kernel keeps what a killed process wrote, so nothing here can tell whether files were flushed before they were renamed.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import killed
import plain
import pytest

from megatron_dsp.checkpoint import manifest, store
from megatron_dsp.errors import UsageError

_ENDING = 16  # changes from the manifest on to the pointer, at most


def _nothing(folder: Path) -> None:
    folder.mkdir()


def _one(folder: Path) -> None:
    plain.save(folder, 1)


def _three(folder: Path) -> None:
    for step in (1, 2, 3):
        plain.save(folder, step)


def _killed_before(folder: Path) -> None:
    """A save of step 5 over another one was killed between its renames."""
    plain.save(folder, 4)
    plain.save(folder, 5)
    (folder / "global_step5").rename(folder / ".global_step5.replaced")
    (folder / ".global_step6.saving").mkdir()
    (folder / ".global_step6.saving" / "half").write_text("of a file")


# What is there, the step to be saved, how many to keep, and what is there afterwards.
_CASES = {
    "the first": (_nothing, 5, 1, {5}),
    "another one": (_one, 5, None, {1, 5}),
    "and older ones are deleted": (_three, 5, 1, {5}),
    "the same again": (_three, 3, 2, {2, 3}),
    "after a kill": (_killed_before, 5, 1, {5}),
}


def _check(folder: Path, before: set[int], step: int) -> None:
    """The checkpoint that is found is the new one or the newest of before, and all that has the name of one is good."""
    tags = {f"global_step{each}" for each in before | {step}}
    assert {name for name in plain.names(folder) if not name.startswith(".")} <= tags | {"latest", "latest.tmp"}
    assert [manifest.check(path) for path in folder.glob("global_step*")] == [[]] * len(list(folder.glob("global_step*")))
    if not before and not (folder / f"global_step{step}").exists():
        with pytest.raises(UsageError, match="no checkpoint there"):
            store.newest_good(folder)
        return
    path, known = store.newest_good(folder)
    # A kill may leave the pointer behind the newest one, or with the first one missing, and never naming what is not there.
    assert all("came after" in line or (not before and line == "latest is missing") for line in known), known
    found = manifest.read(path).progress["iteration"]
    assert found in {step, max(before, default=step)}
    for name in [*plain.FILES, *plain.OURS]:
        assert (path / name).read_bytes() == plain.content(name, found)


def _kill(name: str, folder: Path, everywhere: bool) -> int:
    """Kill the save of a case at each of its changes, or at some of the files' and each that its end begins with."""
    prepare, step, keep, after = _CASES[name]
    prepare(folder / "before")
    before = {manifest.read(path).progress["iteration"] for path in store.candidates(folder / "before")[0]}

    def run(save: Callable[[], object], point: int | None = None) -> int:
        shutil.rmtree(folder / "now", ignore_errors=True)
        shutil.copytree(folder / "before", folder / "now")
        return killed.run(save, point)

    writes = run(functools.partial(plain.write, folder / "now", step))
    save = functools.partial(plain.save, folder / "now", step, keep)
    changes = run(save)
    _check(folder / "now", after - {step}, step)
    assert (folder / "now" / "latest").read_text() == f"global_step{step}"
    assert plain.names(folder / "now") == {"latest", *(f"global_step{each}" for each in after)}

    some = {1, writes // 2, *range(writes, min(writes + _ENDING, changes)), changes}
    for point in range(1, changes + 1) if everywhere else sorted(some):
        assert run(save, point) == point
        _check(folder / "now", before, step)
        plain.save(folder / "now", step + 1, 1)  # the next one works, and leaves nothing else
        assert plain.names(folder / "now") == {"latest", f"global_step{step + 1}"}
        path, known = store.newest_good(folder / "now")
        assert (path.name, known) == (f"global_step{step + 1}", [])
    return changes


@pytest.mark.parametrize("name", ["the first", "and older ones are deleted", "the same again"])
def test_a_kill_at_some_changes(tmp_path, name):
    _kill(name, tmp_path, everywhere=False)


@pytest.mark.long
def test_a_kill_at_every_change(tmp_path):
    changes = {}
    for name in _CASES:
        (tmp_path / name).mkdir()
        changes[name] = _kill(name, tmp_path / name, everywhere=True)
    print(f"killed at {changes}")
    assert sum(changes.values()) >= 200
