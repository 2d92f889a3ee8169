"""Our sections of a ds_config: what is taken, what is refused, and with which words."""

from __future__ import annotations

import copy
import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp import UsageError
from megatron_dsp.config import BatchSizes, Config, load

# The whole of both sections; the first value of each is the default.
KEYS = {
    "sequence_parallel.backend": ["dsp", "ulysses", "ring"],
    "sequence_parallel.size": [1, 2, 64],
    "sequence_parallel.plan": ["auto"],
    "sequence_parallel.transport": ["auto", "torch"],
    "sequence_parallel.overlap.enabled": ["auto", False, True],
    "sequence_parallel.overlap.chunks": ["auto", 1, 4],
    "sequence_parallel.overlap.stream_priority": [-1, 0],
    "sequence_parallel.check_collectives": [False, True, "sampled"],
    "mesh.tensor": [1, 2, 64],
    "mesh.pipe": [1, 2, 64],
}


def _config(key: str, value: object) -> dict:
    """``{"a": {"b": value}}`` for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _value(config: Config, key: str) -> object:
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _refusal(config: object) -> str:
    with pytest.raises(UsageError) as error:
        load(config)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in KEYS.items() for value in values])
def test_every_key_is_read(key, value):
    config = load(_config(key, value))
    assert _value(config, key) == value
    assert all(_value(config, other) == KEYS[other][0] for other in KEYS if other != key)


def test_a_file_a_dict_and_a_loaded_config_are_the_same(tmp_path):
    raw = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": 1},
        "pipeline": {"stages": "auto"},
        "sequence_parallel": {"size": 2},
        "mesh": {"tensor": 3, "pipe": 4},
    }
    given = copy.deepcopy(raw)
    config = load(given)
    assert given == raw, "the caller's dict stays as it is"
    assert config.degrees == {"sequence": 2, "tensor": 3, "pipe": 4}
    assert config.deepspeed == {key: raw[key] for key in raw if key not in ("sequence_parallel", "mesh")}
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(raw))
    assert load(path) == load(str(path)) == load(config) == config


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sequence_parallel.sise", "size"),
        ("sequence_parallel.check_collective", "check_collectives"),
        ("sequence_parallel.overlap.chunk", "chunks"),
        ("mesh.tensr", "tensor"),
        ("sequence_paralell.size", "sequence_parallel"),
        ("Mesh.tensor", "mesh"),
    ],
)
def test_an_unknown_key_gets_the_nearest_suggested(key, near):
    message = _refusal(_config(key, 2))
    assert f"did you mean {near!r}?" in message
    assert (key if key.split(".")[0] in ("sequence_parallel", "mesh") else key.split(".")[0]) in message


@pytest.mark.parametrize("key", ["sequence_parallel.foo", "sequence_parallel.str", "mesh.data", "mesh.a\nb"])
def test_an_unknown_key_near_to_none_gets_the_list(key):
    message = _refusal(_config(key, 2))
    known = "backend, size, plan, transport, overlap, check_collectives" if key.startswith("s") else "tensor, pipe"
    assert "remove it" in message
    assert f"known: {known}" in message


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("sequence_parallel.size", "2", "integer"),
        ("sequence_parallel.size", 2.0, "integer"),
        ("sequence_parallel.size", True, "integer"),
        ("sequence_parallel.size", None, "integer"),
        ("sequence_parallel.size", 0, "greater than or equal to 1"),
        ("mesh.tensor", -1, "greater than or equal to 1"),
        ("mesh.pipe", [2], "integer"),
        ("sequence_parallel.backend", 3, "string"),
        ("sequence_parallel.transport", None, "string"),
        ("sequence_parallel.plan", 5, "string"),
        ("sequence_parallel.overlap", True, "dictionary"),
        ("sequence_parallel.overlap.enabled", 1, "boolean"),
        ("sequence_parallel.overlap.enabled", "yes", "auto"),
        ("sequence_parallel.overlap.chunks", 1.5, "integer"),
        ("sequence_parallel.overlap.chunks", "many", "auto"),
        ("sequence_parallel", 2, "section"),
        ("mesh", [1, 2], "section"),
        ("mesh", None, "section"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_rule(key, value, rule):
    message = _refusal(_config(key, value))
    assert f"{key}={value!r}" in message
    assert rule in message


@pytest.mark.parametrize(
    ("key", "value", "reason", "built"),
    [
        ("backend", "megatron", "is not a value", '"dsp", "ulysses", "ring"'),
        ("transport", "nccl", "is not a value", '"auto", "torch", "mpi"'),
        ("check_collectives", "false", "is not a value", 'true, false, "sampled"'),
        ("plan", ["time", "space"], "is not built yet", '"auto"'),
        ("plan", "plan.json", "is not built yet", '"auto"'),
    ],
)
def test_what_is_not_built_is_refused_with_what_is(key, value, reason, built):
    message = _refusal(_config(f"sequence_parallel.{key}", value))
    assert f"sequence_parallel.{key}={value!r} {reason}" in message
    assert message.endswith(f"use one of: {built}")


@pytest.mark.parametrize("chunks", [0, -3])
def test_an_impossible_number_of_chunks_is_not_promised_for_later(chunks):
    message = _refusal(_config("sequence_parallel.overlap.chunks", chunks))
    assert f"chunks={chunks}" in message
    assert "yet" not in message


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("sequence_parallel_size", 2, '"sequence_parallel": {"size": N}'),
        ("data_parallel_size", 4, "remove it"),
        ("gradient_allreduce_op", "sum", "remove it"),
    ],
)
def test_deepspeed_keys_that_reduce_over_other_groups_are_refused(key, value, fix):
    message = _refusal({key: value})
    assert key in message
    assert fix in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{'train_batch_size': 8}", "is not readable JSON: .*line 1"),
        ("", "is not readable JSON"),
        ("[]", "holds a JSON list"),
        ("8", "holds a JSON int"),
        ('{"mesh": {"tensor": 2}, "mesh": {"pipe": 2}}', "mesh"),
        ('{"mesh": {"tensor": 2, "tensor": 1}}', "tensor"),
    ],
    ids=["quotes", "empty", "array", "number", "section twice", "key twice"],
)
def test_files_that_hold_no_config(tmp_path, text, reason):
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"^config file {path} .*{reason}"):
        load(path)


def test_paths_without_a_config(tmp_path):
    assert "does not exist; give the path" in _refusal(tmp_path / "no.json")
    assert f"config file {tmp_path} is not readable" in _refusal(str(tmp_path))


@given(*[st.none() | st.integers(1, 24)] * 3, st.integers(1, 5))
def test_batch_sizes_follow_the_rule_of_deepspeed(train, micro, steps, data):
    """train = micro x accumulation x data; an accumulation that nothing else fixes is 1."""
    given = (train, micro, steps)
    fixed = steps is not None or (train is not None and micro is not None)
    possible = [(m * s * data, m, s) for m, s in product(range(1, 25), range(1, 25) if fixed else [1])]
    solutions = [sizes for sizes in possible if all(want in (None, got) for want, got in zip(given, sizes, strict=True))]
    sizes = BatchSizes(**dict(zip(BatchSizes.model_fields, given, strict=True)))
    if train is None and micro is None:
        with pytest.raises(UsageError, match="neither train_batch_size nor train_micro_batch_size_per_gpu"):
            sizes.complete(data)
    elif not solutions:
        with pytest.raises(UsageError, match=rf"train_batch_size={train} must be .*data={data} = \d+ .*change one"):
            sizes.complete(data)
    else:
        assert [sizes.complete(data)] == solutions


@pytest.mark.parametrize("key", sorted(BatchSizes.model_fields))
@pytest.mark.parametrize("value", ["8", 0, 2.5, "auto", True])
def test_batch_sizes_are_whole_numbers(key, value):
    with pytest.raises(UsageError, match=rf"{key}={value!r}: input should be .*(integer|greater)"):
        _ = load({key: value}).batch_sizes


def test_completed_batch_sizes_stand_in_the_config():
    config = load({"train_batch_size": 12, "gradient_accumulation_steps": 3, "steps_per_print": 7})
    completed = config.with_batch_sizes(*config.batch_sizes.complete(2))
    assert completed.deepspeed == {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "steps_per_print": 7,
    }
    assert "train_micro_batch_size_per_gpu" not in config.deepspeed
