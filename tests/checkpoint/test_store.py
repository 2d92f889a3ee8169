"""Which checkpoint of a folder is loaded, and which ones are deleted."""

from __future__ import annotations

import logging
from pathlib import Path

import plain
import pytest

from megatron_dsp.checkpoint import manifest, store
from megatron_dsp.errors import UsageError


@pytest.fixture
def folder(tmp_path) -> Path:
    """Checkpoints of the steps 2, 9 and 10, saved in this order."""
    for step in (2, 9, 10):
        plain.save(tmp_path, step)
    return tmp_path


def _damage(path: Path) -> None:
    (path / plain.OURS[0]).unlink()


def test_the_one_that_latest_names_is_taken(folder):
    assert store.newest_good(folder) == (folder / "global_step10", [])
    (folder / "latest").write_text("global_step2\n")
    path, known = store.newest_good(folder)
    assert path == folder / "global_step2"
    assert known == ["global_step10, global_step9 came after global_step2, which latest names"]


def test_else_the_newest_good_one(folder):
    _damage(folder / "global_step10")
    path, known = store.newest_good(folder)
    assert path == folder / "global_step9"
    assert known == [f"global_step10 is damaged ({plain.OURS[0]} is missing)"]
    (folder / "global_step9" / manifest.NAME).unlink()
    path, known = store.newest_good(folder)
    assert path == folder / "global_step2"
    assert len(known) == 2
    _damage(folder / "global_step2")
    with pytest.raises(UsageError, match="no good checkpoint there") as error:
        store.newest_good(folder)
    for step in (2, 9, 10):
        assert f"global_step{step} is damaged" in str(error.value)


@pytest.mark.parametrize("text", [None, "", "global_step3", "../elsewhere"])
def test_a_wrong_pointer_is_told(folder, text):
    (folder / "latest").unlink()
    if text is not None:
        (folder / "latest").write_text(text)
    path, known = store.newest_good(folder)
    assert path == folder / "global_step10"
    assert known == ["latest is missing" if text is None else f"latest names {text!r}, and no such checkpoint is there"]


def test_nothing_to_load(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="no checkpoint there; give the folder of a --save"):
            store.newest_good(folder)
    (tmp_path / "latest").write_text("global_step3")
    (tmp_path / ".global_step3.saving").mkdir()
    with pytest.raises(UsageError, match=r"no checkpoint there \(latest names 'global_step3'"):
        store.newest_good(tmp_path)


def test_a_replaced_one_whose_successor_has_no_name_yet(folder):
    (folder / "global_step10").rename(folder / ".global_step10.replaced")
    assert store.newest_good(folder) == (folder / ".global_step10.replaced", [])
    plain.save(folder, 11)
    assert plain.names(folder) == {"latest", *(f"global_step{step}" for step in (2, 9, 10, 11))}


def test_keep_counts_from_the_newest(folder):
    plain.save(folder, 11, keep=3)
    assert plain.names(folder) == {"latest", "global_step9", "global_step10", "global_step11"}
    plain.save(folder, 12, keep=1)
    assert plain.names(folder) == {"latest", "global_step12"}


def test_keep_goes_by_when_they_were_saved(folder):
    """After a run has gone back to step 2, what it saves next is newer than step 10."""
    files = plain.write(folder, 3)
    store.publish(folder, "global_step3", plain.record(files, 59), keep=1)
    assert plain.names(folder) == {"latest", "global_step3"}


def test_what_is_not_ours_is_not_deleted(folder, caplog):
    (folder / "global_step5").mkdir()
    (folder / "global_step5" / "mp_rank_00_model_states.pt").write_text("of DeepSpeed alone")
    (folder / "notes").mkdir()
    (folder / "global_step7").write_text("a file")
    plain.save(folder, 12, keep=1)
    assert plain.names(folder) == {"latest", "global_step12", "global_step5", "notes", "global_step7"}
    with caplog.at_level(logging.WARNING):
        plain.save(folder, 5)
        (folder / "global_step5" / manifest.NAME).unlink()
        plain.save(folder, 5)
    assert (folder / "global_step5.set_aside" / "mp_rank_00_model_states.pt").read_text() == "of DeepSpeed alone"
    assert (folder / "global_step5.set_aside2" / plain.OURS[0]).is_file()
    assert [record.getMessage().count("global_step5.set_aside") for record in caplog.records] == [1, 1]
    assert store.newest_good(folder)[0] == folder / "global_step5"


def test_a_save_that_is_abandoned(folder):
    plain.write(folder, 11)
    store.abandon(folder, "global_step11")
    store.abandon(folder, "global_step11")
    assert plain.names(folder) == {"latest", *(f"global_step{step}" for step in (2, 9, 10))}
