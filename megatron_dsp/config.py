"""Our sections of a DeepSpeed config, ``"sequence_parallel"`` and ``"mesh"``, validated (docs/config.md).

DeepSpeed ignores top-level keys that it does not know, so only this file can catch a typo in them.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_dsp.errors import UsageError

# What the design names, and of it what is built. A value in the first and not in the second is refused by name.
_BUILT: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "backend": (("dsp", "ulysses", "ring"), ("dsp", "ulysses", "ring")),
    "plan": (("auto",), ("auto",)),
    "transport": (("auto", "torch", "mpi"), ("auto", "torch", "mpi")),
    "check_collectives": ((True, False, "sampled"), (True, False, "sampled")),
}

# Keys of DeepSpeed's own that would reduce gradients over other groups than data x sequence.
_REFUSED = {
    "sequence_parallel_size": 'DeepSpeed would not reduce gradients over it; use "sequence_parallel": {"size": N}',
    "data_parallel_size": "the data axis fills the world; remove it",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class OverlapSection(_Section):
    """Overlap of reshards with compute."""

    enabled: bool | Literal["auto"] = "auto"
    chunks: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    stream_priority: Annotated[int, Field(le=0)] = -1


class SequenceParallel(_Section):
    """The ``"sequence_parallel"`` section."""

    backend: str = "dsp"
    size: int = Field(1, ge=1)
    plan: str | list[Any] = "auto"
    transport: str = "auto"
    overlap: OverlapSection = OverlapSection()
    check_collectives: bool | str = False
    compile: bool = False
    cuda_graphs: bool = False


class MeshDegrees(_Section):
    """The ``"mesh"`` section: the degrees beside the sequence axis's; data fills the world."""

    tensor: int = Field(1, ge=1)
    pipe: int = Field(1, ge=1)


class BatchSizes(BaseModel):
    """DeepSpeed's three batch sizes, of which two give the third. ``train_batch_size`` counts samples once."""

    train_batch_size: int | None = Field(None, ge=1, strict=True)
    train_micro_batch_size_per_gpu: int | None = Field(None, ge=1, strict=True)
    gradient_accumulation_steps: int | None = Field(None, ge=1, strict=True)

    def complete(self, data: int) -> tuple[int, int, int]:
        """(train, micro, accumulation) for ``data`` data-parallel ranks: train = micro x accumulation x data.

        A missing accumulation is 1 where that is not fixed by the other two. Errors: UsageError, naming the product.
        """
        train, micro, steps = (
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )
        if train is None and micro is None:
            raise UsageError("the config gives neither train_batch_size nor train_micro_batch_size_per_gpu; give one")
        if micro is None:
            micro = max(1, (train or 1) // ((steps or 1) * data))
        if steps is None:
            steps = 1 if train is None else max(1, train // (micro * data))
        if train is not None and train != micro * steps * data:
            raise UsageError(
                f"train_batch_size={train} must be train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps="
                f"{steps} x data={data} = {micro * steps * data} (the ranks of a sequence group share their samples and "
                "count once); change one of them"
            )
        return micro * steps * data, micro, steps


@dataclass(frozen=True)
class Config:
    """A ds_config: our sections, and the rest as DeepSpeed gets it."""

    sequence_parallel: SequenceParallel
    mesh: MeshDegrees
    deepspeed: dict[str, Any]

    @property
    def degrees(self) -> dict[str, int]:
        """The mesh's degrees as keyword arguments of ``Mesh``."""
        return {"tensor": self.mesh.tensor, "pipe": self.mesh.pipe, "sequence": self.sequence_parallel.size}

    @property
    def batch_sizes(self) -> BatchSizes:
        """The batch sizes that the config gives."""
        try:
            return BatchSizes(**{key: self.deepspeed.get(key) for key in BatchSizes.model_fields})
        except ValidationError as error:
            raise _usage_error(error, "", BatchSizes) from None

    def with_batch_sizes(self, train: int, micro: int, steps: int) -> Config:
        """The same config with all three batch sizes given."""
        sizes = dict(zip(BatchSizes.model_fields, (train, micro, steps), strict=True))
        return replace(self, deepspeed={**self.deepspeed, **sizes})


def load(config: str | Path | dict[str, Any] | Config) -> Config:
    """Read and validate a ds_config from a path or a dict.

    Errors: UsageError for a missing file, bad JSON, an unknown key of our sections (with the nearest known one), a value of
    the wrong kind, a value that is not built yet (with the list of those that are), and DeepSpeed keys that contradict us.
    """
    if isinstance(config, Config):
        return config
    raw = dict(config) if isinstance(config, dict) else read(Path(config))
    for key, fix in _REFUSED.items():
        if key in raw:
            raise UsageError(f"config key {key}={raw[key]!r} cannot be used with megatron_dsp: {fix}")
    if raw.get("gradient_allreduce_op", "mean") != "mean":
        raise UsageError('gradient_allreduce_op must be "mean": gradients are averaged over data x sequence; remove it')
    sections = ("sequence_parallel", "mesh")
    for key in raw:
        near = difflib.get_close_matches(str(key).lower(), sections, n=1, cutoff=0.8)
        if near and key not in sections:
            raise UsageError(f"unknown config section {key!r}; did you mean {near[0]!r}?")
    sequence_parallel = _section(raw, "sequence_parallel", SequenceParallel)
    degrees = _section(raw, "mesh", MeshDegrees)
    _refuse_what_is_not_built(sequence_parallel)
    return Config(sequence_parallel, degrees, {key: value for key, value in raw.items() if key not in sections})


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a ds_config file. Errors: UsageError where there is none."""
    try:
        raw = json.loads(path.read_text(), object_pairs_hook=lambda pairs: _without_duplicates(path, pairs))
    except FileNotFoundError:
        raise UsageError(f"config file {path} does not exist; give the path of a ds_config JSON file, or a dict") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"config file {path} is not readable JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"config file {path} holds a JSON {type(raw).__name__}; a ds_config is an object {{...}}")
    return raw


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As DeepSpeed refuses them in the files that it reads itself."""
    section = dict(pairs)
    if len(section) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UsageError(f"config file {path} gives the key {twice!r} twice in one section; keep one of them")
    return section


def _section(raw: dict[str, Any], name: str, model: type[_Section]) -> Any:
    section = raw.get(name, {})
    if not isinstance(section, dict):
        raise UsageError(f'config key {name}={section!r} must be a section: "{name}": {{...}}')
    try:
        return model(**section)
    except ValidationError as error:
        raise _usage_error(error, name + ".", model) from None


def _usage_error(error: ValidationError, prefix: str, model: type[BaseModel]) -> UsageError:
    """The first of pydantic's findings, as one line; all of them where a key may be of several kinds."""
    finding, *others = error.errors()
    path = [str(part) for part in finding["loc"]]
    if finding["type"] == "extra_forbidden":
        key = repr(prefix + ".".join(path))[1:-1]  # a key may hold anything, and the message is one line
        known = list((OverlapSection if path[0] == "overlap" and len(path) > 1 else model).model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it"
        return UsageError(f"unknown config key {key}; {hint} (known: {', '.join(known)})")
    # A union's findings name the branch after the key; the key itself is what the user wrote.
    path = path[: 2 if path[0] == "overlap" else 1]
    same = [other["msg"].lower() for other in others if list(map(str, other["loc"]))[: len(path)] == path]
    return UsageError(
        f"config key {prefix}{'.'.join(path)}={finding['input']!r}: {' or '.join([finding['msg'].lower(), *same])}"
    )


def _refuse_what_is_not_built(section: SequenceParallel) -> None:
    for key, (named, built) in _BUILT.items():
        value = getattr(section, key)
        if any(value == choice and type(value) is type(choice) for choice in built):
            continue
        choices = ", ".join(json.dumps(choice) for choice in built)
        known = key == "plan" or any(value == choice for choice in named)
        reason = "is not built yet" if known else "is not a value of this key"
        raise UsageError(f"config key sequence_parallel.{key}={value!r} {reason}; use one of: {choices}")
