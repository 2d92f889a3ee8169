"""Arguments by position or by name, however the caller passed them, and items of what a module returns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.plan import Key, unknown_name


class Parameters:
    """The parameters of a module's ``forward``."""

    def __init__(self, module: nn.Module):
        parameters = inspect.signature(module.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self._names = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._any_position = inspect.Parameter.VAR_POSITIONAL in kinds
        self._any_name = inspect.Parameter.VAR_KEYWORD in kinds

    def check(self, module: str, key: Key) -> None:
        """Errors: UsageError where ``forward`` takes no such argument."""
        if isinstance(key, str) and key not in self._names and not self._any_name:
            unknown_name(f"module {module!r}: argument", key, self._names)
        if isinstance(key, int) and not 0 <= key < len(self._names) and not self._any_position:
            raise UsageError(f"module {module!r}: argument {key} does not exist; its forward takes {', '.join(self._names)}")

    def place(self, key: Key, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Key | None:
        """Where the caller passed it: its index in ``args`` or name in ``kwargs``; None where it did not, or passed None."""
        position = self._names.index(key) if key in self._names else key
        if isinstance(position, int) and position < len(args):
            return None if args[position] is None else position
        name = self._names[position] if isinstance(position, int) and position < len(self._names) else key
        return name if isinstance(name, str) and kwargs.get(name) is not None else None


def put(args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[Key, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``values`` in their places."""
    positions = list(args)
    names = dict(kwargs)
    for key, value in values.items():
        if isinstance(key, int):
            positions[key] = value
        else:
            names[key] = value
    return tuple(positions), names


def item(output: Any, key: Key, where: str) -> Any:
    """An item of what a module returned; 0 of a tensor is the tensor. Errors: UsageError where there is none."""
    if isinstance(output, Tensor) and key == 0:
        return output
    try:
        if isinstance(output, Tensor):
            raise KeyError(key)
        return output[key]
    except (KeyError, IndexError, TypeError):
        raise UsageError(
            f"{where}: it returns a {type(output).__name__}, which has no item {key!r} that the plan names"
        ) from None


def with_items(output: Any, values: Mapping[Key, Any]) -> Any:
    """``output`` with ``values`` in the places of its items; the module's own object stays as it is."""
    if isinstance(output, Tensor):
        return values[0]
    if isinstance(output, tuple):
        items = [values.get(index, value) for index, value in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else tuple(items)
    result = copy.copy(output)
    for key, value in values.items():
        result[key] = value
    return result
