"""Arguments by position or by name, however the caller passed them, what a module returns, and the items of both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.model_plan import unknown_name
from megatron_dsp.parallelize.module_needs import ArgumentOrItem, Key

Passed: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a call, by position and by name


class Parameters:
    """The parameters of a module's ``forward``; ``where`` says in errors which module's."""

    def __init__(self, where: str, module: nn.Module):
        self._where = where
        parameters = inspect.signature(module.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self._names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._any_position = inspect.Parameter.VAR_POSITIONAL in kinds
        self._any_name = inspect.Parameter.VAR_KEYWORD in kinds

    def check(self, place: ArgumentOrItem) -> None:
        """Errors: UsageError where ``forward`` takes no such argument."""
        key = _path(place)[0]
        if isinstance(key, str) and key not in self._names and not self._any_name:
            unknown_name(f"{self._where}: argument", key, self._names)
        if isinstance(key, int) and not 0 <= key < len(self._names) and not self._any_position:
            raise UsageError(f"{self._where}: argument {key} does not exist; its forward takes {', '.join(self._names)}")

    def path(self, place: ArgumentOrItem, passed: Passed) -> tuple[Key, ...] | None:
        """Where the caller passed it: its index or name, then the items within; None where it did not, or passed None.

        Errors: UsageError where an argument has no such item.
        """
        key, *items = _path(place)
        args, kwargs = passed
        position = self._names.index(key) if key in self._names else key
        if not (isinstance(position, int) and position < len(args)):
            position = self._names[position] if isinstance(position, int) and position < len(self._names) else key
            if not isinstance(position, str) or position not in kwargs:
                return None
        value = args[position] if isinstance(position, int) else kwargs[position]
        for depth, item in enumerate(items):
            if value is None:
                return None
            value = _item(value, item, f"{self.describe((key, *items[:depth]) if depth else key)} is")
        return None if value is None else (position, *items)

    def required_path(self, place: ArgumentOrItem, passed: Passed) -> tuple[Key, ...]:
        """As `path`. Errors: UsageError where it was not passed."""
        path = self.path(place, passed)
        if path is None:
            raise UsageError(f"{self.describe(place)} was not passed; the plan names it, and needs it in every call")
        return path

    def describe(self, place: ArgumentOrItem) -> str:
        """The argument, for errors."""
        return f"{self._where}: argument {place!r}"


def get(passed: Passed, path: tuple[Key, ...]) -> Any:
    """What `Parameters.path` has found."""
    key, *items = path
    value = passed[0][key] if isinstance(key, int) else passed[1][key]
    for item in items:
        value = value[item]
    return value


def put(passed: Passed, values: Mapping[tuple[Key, ...], Any]) -> tuple[Passed, list[Callable[[], None]]]:
    """The arguments with ``values`` in their places, and what is to be called after the module.

    Items are replaced in copies of tuples and dicts, but in lists themselves: a module may pop them. Those that it has left
    there are put back by what is returned.
    """
    positions, names = list(passed[0]), dict(passed[1])
    undo: list[Callable[[], None]] = []
    for (key, *items), value in values.items():
        if isinstance(key, int):
            positions[key] = _replace_item(positions[key], items, value, undo)
        else:
            names[key] = _replace_item(names[key], items, value, undo)
    return (tuple(positions), names), undo


def output_item(output: Any, place: ArgumentOrItem, where: str) -> Any:
    """An item of what a module returned; 0 of a tensor is the tensor. Errors: UsageError where there is none."""
    if isinstance(output, Tensor) and place == 0:
        return output
    for key in _path(place):
        output = _item(output, key, f"{where}: it returns")
    return output


def float_tensors(value: Any) -> Iterator[Tensor]:
    """Those in what a module returned, however deep."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from float_tensors(item)


def containers(value: Any) -> Iterator[list[Any] | dict[Any, Any] | set[Any]]:
    """The lists, dicts and sets in arguments, however deep: what a module may add to, or take from."""
    if isinstance(value, (list, dict, set)):
        yield value
    if isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from containers(item)


def find_tensor(value: Any) -> Tensor | None:
    """The first tensor that has dims, however deep in arguments or in what a module returned; None where there is none."""
    if isinstance(value, Tensor):
        return value if value.dim() else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((found for found in map(find_tensor, items) if found is not None), None)


def replace_items(output: Any, values: Mapping[ArgumentOrItem, Any]) -> Any:
    """``output`` with ``values`` in the places of its items; the module's own object stays as it is."""
    for place, value in values.items():
        output = value if isinstance(output, Tensor) else _replace_item(output, list(_path(place)), value)
    return output


def _path(place: ArgumentOrItem) -> tuple[Key, ...]:
    return place if isinstance(place, tuple) else (place,)


def _item(value: Any, key: Key, where: str) -> Any:
    try:
        if isinstance(value, Tensor):
            raise KeyError(key)
        return value[key]
    except (KeyError, IndexError, TypeError):
        raise UsageError(f"{where} a {type(value).__name__}, which has no item {key!r} that the plan names") from None


def _replace_item(value: Any, items: list[Key], new: Any, undo: list[Callable[[], None]] | None = None) -> Any:
    """``value`` with ``new`` in the place of an item; in ``value`` itself where it is a list and it can be undone."""
    if not items:
        return new
    key, *rest = items
    new = _replace_item(value[key], rest, new, undo)
    if isinstance(value, tuple):
        index = range(len(value))[key]  # type: ignore[index]
        changed = [new if place == index else old for place, old in enumerate(value)]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if isinstance(value, list) and undo is not None:
        index = range(len(value))[key]  # type: ignore[index]
        undo.append(partial(_put_back, value, index, value[index], new))
        value[index] = new
        return value
    if isinstance(value, Mapping) and key not in value:  # outputs of transformers and diffusers have positions too
        key = list(value)[key]  # type: ignore[index]
    result = copy.copy(value)
    result[key] = new
    return result


def _put_back(values: list[Any], index: int, old: Any, new: Any) -> None:
    if index < len(values) and values[index] is new:
        values[index] = old
