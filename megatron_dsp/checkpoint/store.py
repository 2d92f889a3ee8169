"""A folder of checkpoints, ``global_stepN/`` each, and the pointer ``latest``, so that a kill at any time spoils none.

A checkpoint is written under a hidden name beside the others, gets its name when all of it is on the disk, and is pointed to
after that. Another one loses its name before anything of it is deleted. So whatever has the name of a checkpoint is whole, but
for later damage, which its manifest tells. Functions here are called by one process of a job.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.disk import durable_file, sync
from megatron_dsp.checkpoint.file_names import STEP
from megatron_dsp.checkpoint.manifest import Manifest
from megatron_dsp.errors import UsageError

POINTER = "latest"  # DeepSpeed's name and content: the name of a checkpoint
_TAG = re.compile(rf"{STEP}\d+")
_HIDDEN = re.compile(rf"\.({STEP}\d+)\.(saving|replaced|deleted)")

logger = logging.getLogger(__name__)


def begin(folder: Path, tag: str) -> Path:
    """A new folder to write checkpoint ``tag`` into; what an earlier kill left in ``folder`` is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    path = folder / temporary_name(tag)
    path.mkdir()
    return path


def temporary_name(tag: str) -> str:
    """The name that checkpoint ``tag`` has while it is written."""
    return f".{tag}.saving"


def publish(folder: Path, tag: str, record: Manifest, keep: int | None = None) -> None:
    """Make what was written since `begin`, and is on the disk, checkpoint ``tag``, and let ``latest`` name it.

    ``keep``: only the newest so many checkpoints of this package stay, this one included; None: all.
    """
    new, path = folder / temporary_name(tag), folder / tag
    for subfolder in {(new / name).parent for name in record.files} - {new}:
        sync(subfolder)
    manifest.write(new, record)  # which brings the names in the folder to the disk too
    if path.exists():
        _set_aside(path)
    new.rename(path)
    sync(folder)
    with durable_file(folder / POINTER) as file:
        file.write(tag.encode())
    old = [replaced for replaced in [folder / f".{tag}.replaced"] if replaced.exists()]
    if keep is not None:
        others = [other for other, of_other in _checkpoints(folder) if of_other is not None and other != path]
        old += others[keep - 1 :]
    for each in old:
        try:
            _delete(each)
        except OSError as error:  # this checkpoint is safe; the next save tries again
            logger.warning("%s could not be removed: %s", each, error)


def abandon(folder: Path, tag: str) -> None:
    """Remove what was written since `begin`."""
    if (folder / temporary_name(tag)).exists():
        _delete(folder / temporary_name(tag))


def candidates(folder: Path) -> tuple[list[Path], list[str]]:
    """The checkpoints to load, the best first, and what is strange about ``latest``, one line each.

    The best is the one that ``latest`` names; the others follow, the newest first.
    """
    found, named = _checkpoints(folder), pointer(folder)
    tags = [_tag(path) for path, _ in found]
    strange = []
    if tags and named is None:
        strange.append(f"{POINTER} is missing")
    elif named is not None and named not in tags:
        strange.append(f"{POINTER} names {named[:80]!r}, and no such checkpoint is there")
    elif named is not None:
        later = [_tag(path) for path, of_path in found[: tags.index(named)] if of_path is not None]
        strange += [f"{', '.join(later)} came after {named}, which {POINTER} names"] if later else []
    return sorted((path for path, _ in found), key=lambda path: _tag(path) != named), strange  # keeps their order otherwise


def pointer(folder: Path) -> str | None:
    """What ``latest`` names."""
    try:
        return (folder / POINTER).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None


def newest_good(
    folder: Path,
    found: tuple[list[Path], list[str]] | None = None,
    check: Callable[[Path], list[str]] = manifest.check,
) -> tuple[Path, list[str]]:
    """The checkpoint in ``folder`` to load, and what a user should know of the others and of ``latest``, one line each.

    It is the first of the `candidates` in which ``check`` finds nothing. ``found``: those, where they are known already.
    Errors: UsageError that names all, where there is no good one.
    """
    paths, known = candidates(folder) if found is None else found
    known = list(known)
    for path in paths:
        problems = check(path)
        if not problems:
            return path, known
        known.append(f"{_tag(path)} is damaged ({shorten(problems)})")
    if not paths:
        raise UsageError(
            f"--load {folder}: no checkpoint there{f' ({known[0]})' if known else ''}; give the folder of a --save"
        )
    raise UsageError(f"--load {folder}: no good checkpoint there: {'; '.join(known)}; give the folder of another --save")


def shorten(problems: list[str]) -> str:
    """The first few of them in one line."""
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


def _checkpoints(folder: Path) -> list[tuple[Path, Manifest | None]]:
    """Checkpoints and their manifests, the one saved last first; before them those whose manifests cannot be read.

    A kill between two renames leaves a replaced checkpoint without its name, and the one that should have it without as well.
    """
    found: list[tuple[Path, Manifest | None]] = []
    for path in folder.iterdir() if folder.is_dir() else []:
        match = _HIDDEN.fullmatch(path.name)
        lost = match is not None and match[2] == "replaced" and not (folder / match[1]).exists()
        if not path.is_dir() or not (lost or _TAG.fullmatch(path.name)):
            continue
        try:
            found.append((path, manifest.read(path)))
        except UsageError:
            found.append((path, None))
    return sorted(found, key=lambda entry: ("~" if entry[1] is None else entry[1].saved, entry[0].name), reverse=True)


def _tag(path: Path) -> str:
    match = _HIDDEN.fullmatch(path.name)
    return path.name if match is None else match[1]


def _set_aside(path: Path) -> None:
    """Take the name of what a new checkpoint replaces. What this package cannot tell to be its own will not be deleted."""
    try:
        manifest.read(path)
    except UsageError as error:
        aside = path.with_name(f"{path.name}.set_aside")
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}.set_aside{number}")
        logger.warning("%s (%s) is %s from now on: a new checkpoint takes its name", path, error, aside.name)
    else:
        aside = path.with_name(f".{path.name}.replaced")
    path.rename(aside)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left; a replaced checkpoint whose successor never got its name has its own again."""
    for path in sorted(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
            sync(folder)
        else:
            _delete(path)


def _delete(path: Path) -> None:
    """Take the name of a checkpoint away, then delete it: half of one never has the name of a whole one."""
    nameless = path.with_name(f".{_tag(path)}.deleted")
    if nameless.exists():
        shutil.rmtree(nameless)
    if path != nameless:
        path.rename(nameless)
        sync(path.parent)
        shutil.rmtree(nameless)
