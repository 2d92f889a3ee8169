"""``manifest.json``: what a checkpoint consists of, and whether it still does.

It is written when all other files of the checkpoint are on the disk. It lists each with its size and hash, says how the run was
laid out and how far it had come, and ends with a hash of itself. Nothing of a checkpoint is loaded to check it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.checkpoint.parameters import Model
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT
from megatron_dsp.errors import UsageError

NAME = "manifest.json"
FORMAT = 1
CONTENTS = {WEIGHT: "weights", AVERAGE: "ema"}  # what `Manifest.contents` calls files with all tensors of a kind
_PACKAGES = "megatron-dsp", "torch", "deepspeed"
_PIECE = 4 * 2**20  # bytes that are hashed at once


@dataclass(frozen=True)
class StoredFile:
    """A file as it was saved: its size in bytes, and the SHA-256 of what it holds, in hex."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
        saved: when, in UTC, as a text that sorts by time.
        progress: iteration and consumed samples.
        layout: the degree of each axis of the mesh, and the ZeRO stage.
        precision: of the model: fp32, bf16 or fp16.
        contents: what is there beside DeepSpeed's files.
        versions: of what wrote it, by package.
        model: its parameters, and how they are named and ordered in DeepSpeed's files.
        files: by their paths in the folder, with ``/``.
    """

    saved: str
    progress: dict[str, int]
    layout: dict[str, int]
    precision: str
    contents: list[str]
    versions: dict[str, str]
    model: Model
    files: dict[str, StoredFile]

    @classmethod
    def new(
        cls,
        progress: dict[str, int],
        layout: dict[str, int],
        precision: str,
        contents: list[str],
        model: Model,
        files: dict[str, StoredFile],
    ) -> Manifest:
        """That of a checkpoint which is saved now, by the versions that are installed."""
        saved = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
        return cls(saved, progress, layout, precision, contents, versions, model, files)


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the checkpoint in ``folder``; it is on the disk afterwards."""
    with durable_file(folder / NAME) as file:
        file.write(_text({"format": FORMAT, **asdict(manifest), "model": manifest.model.to_json()}))


def read(folder: Path) -> Manifest:
    """The manifest of the checkpoint in ``folder``.

    Errors: UsageError where there is none, where it is damaged, and where a newer version of this package wrote it.
    """
    try:
        text = (folder / NAME).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{NAME} is missing") from None
    except OSError as error:
        raise UsageError(f"{NAME} cannot be read ({error.strerror})") from error
    try:
        record = json.loads(text)
        number = record["format"]
        if isinstance(number, int) and number > FORMAT:
            raise UsageError(f"{NAME} is of format {number}, and this version of megatron_dsp knows {FORMAT}; use a newer one")
        del record["sha256"]
        if number != FORMAT or _text(record) != text:
            raise UsageError(f"{NAME} was changed: it is not as it was written")
        del record["format"]
        files = {name: StoredFile(**entry) for name, entry in record.pop("files").items()}
        manifest = Manifest(files=files, model=Model.from_json(record.pop("model")), **record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{NAME} was changed: it is no manifest any more") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UsageError(f"{NAME} lists {name!r}, which is outside of the checkpoint")
    return manifest


def check(folder: Path, *, hashes: bool = True) -> list[str]:
    """What is wrong with the checkpoint in ``folder``, a line for each file; nothing: it is as it was saved.

    ``hashes=False`` compares names and sizes alone, which reads no file but the manifest.
    """
    try:
        manifest = read(folder)
    except UsageError as error:
        return [str(error)]
    problems = check_sizes(folder, manifest)
    lines = list(problems.values())
    if hashes:
        lines += check_hashes(folder, manifest, manifest.files.keys() - problems.keys())
    return lines


def check_sizes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong by names and sizes, a line for each file.

    Files may be missing, cut off or too long; and DeepSpeed, which reads by pattern, would take more ``.pt`` files for its own.
    """
    problems = {}
    for name, stored in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            problems[name] = f"{name} is missing"
            continue
        if size != stored.size:
            how = "cut off" if size < stored.size else "too long"
            problems[name] = f"{name} is {how}: {size:,} bytes instead of {stored.size:,}"
    extra = sorted({path.name for path in folder.glob("*.pt")} - manifest.files.keys())
    return problems | {name: f"{name} does not belong there" for name in extra}


def check_hashes(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that hold other bytes than they were saved with, a line for each."""
    problems = []
    for name in sorted(names):
        try:
            if sha256(folder / name) != manifest.files[name].sha256:
                problems.append(f"{name} was changed: it holds other bytes than were saved")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex. A few MiB of it are in memory at a time."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def hash_files(folder: Path) -> dict[str, StoredFile]:
    """All files in ``folder`` as they are now, by their paths in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): StoredFile(path.stat().st_size, sha256(path)) for path in paths}


def divide(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names in ``parts`` lists of about equal bytes; a function of the arguments alone."""
    shares: list[list[str]] = [[] for _ in range(parts)]
    bytes_of = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = bytes_of.index(min(bytes_of))
        shares[least].append(name)
        bytes_of[least] += sizes[name]
    return shares


def _text(record: dict[str, Any]) -> bytes:
    """The one way to write a record: any other text is a damaged one."""
    own = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "sha256": own}, indent=1, sort_keys=True).encode()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "not installed"
