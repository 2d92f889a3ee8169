"""Attributes of a module that hold what is local while it runs: tables of positions, numbers of a config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.call_arguments import float_tensors
from megatron_dsp.parallelize.module_needs import Computed, LocalSize, Slice
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.sharded_forward import ShardedForward

_NOTHING = object()


class LocalAttributes:
    """Of one module.

    Local values stand before the module's own in its ``__dict__``. So buffers, parameters and the objects in which numbers lie
    stay what they are, for other modules and for the state dict.
    """

    def __init__(self, name: str, module: nn.Module, sides: Mapping[str, Slice | LocalSize | Computed]):
        self._where, self._sides = f"module {name!r}: attribute", sides
        self.module = module  # or its copy in a copied model: the one that runs
        self._own: dict[str, Any] = {}
        self.waiting = False  # whether the module runs, and waits for the region to be entered in it
        for path in sides:
            self._value(path)

    def make_local(self, forward: ShardedForward, sharded: str) -> None:
        """Until `restore`, the module finds what it has where ``sharded`` is sharded. Errors: RankError for other shapes."""
        self.restore()
        for path, side in self._sides.items():
            where, own = f"{self._where} {path!r}", self._value(path)
            if isinstance(side, Slice):
                value = forward.own_rows(where, own, parse(side.pattern), sharded)
            else:
                value = forward.local_value(where, own, side, sharded, forward.sizes_for_attributes(sharded))
            first, *rest = path.split(".")
            self._put(first, _copy_with_attribute(getattr(self.module, first), rest, value) if rest else value)

    def make_local_in_backward(self, output: Any, forward: ShardedForward, sharded: str) -> None:
        """As `make_local`, from where backward comes to ``output`` until it ends.

        A module may compute its own forward again there (transformers' layers do), which calls no hooks.
        """
        for x in float_tensors(output):
            if x.requires_grad:
                x.register_hook(lambda _: self._make_local_until_backward_ends(forward, sharded))

    def _make_local_until_backward_ends(self, forward: ShardedForward, sharded: str) -> None:
        if not self._own:
            torch.autograd.Variable._execution_engine.queue_callback(self.restore)
        with torch.enable_grad():  # hooks run without; a part of a parameter has a gradient
            self.make_local(forward, sharded)

    def wait(self, module: nn.Module) -> None:
        """The module is called, and the region is to be entered in it."""
        self.module, self.waiting = module, True

    def finish(self) -> None:
        """The module has returned, or raised."""
        self.waiting = False
        self.restore()

    def restore(self) -> None:
        """The module finds its own attributes again."""
        for name, value in self._own.items():
            if value is _NOTHING:
                del self.module.__dict__[name]
            else:
                self.module.__dict__[name] = value
        self._own.clear()

    def _put(self, name: str, value: Any) -> None:
        self._own.setdefault(name, self.module.__dict__.get(name, _NOTHING))
        self.module.__dict__[name] = value

    def _value(self, path: str) -> Any:
        value: Any = self.module
        for name in path.split("."):
            if not hasattr(value, name):
                raise UsageError(f"{self._where} {path!r} is not there: a {type(value).__name__} has no {name!r}")
            value = getattr(value, name)
        return value


def _copy_with_attribute(value: Any, path: list[str], new: Any) -> Any:
    """A shallow copy of ``value`` in which one attribute, or one of an attribute, is ``new``."""
    name, *rest = path
    if isinstance(value, (Tensor, nn.Module)):
        raise UsageError(f"a {type(value).__name__} that holds {name!r} cannot be copied; name its own module in attributes=")
    result = copy.copy(value)
    setattr(result, name, _copy_with_attribute(getattr(value, name), rest, new) if rest else new)
    return result
