"""Patterns name the dims of a tensor: ``"(B T) S C"`` has three, of which the first is B and T flattened in this order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from torch import Tensor

from megatron_dsp.errors import UsageError


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; made by `parse`.

    Attributes:
        text: as it was written.
        groups: for each dim of the tensor, the names of the dims that are flattened into it.
    """

    text: str
    groups: tuple[tuple[str, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in storage order."""
        return tuple(name for group in self.groups for name in group)

    def sizes(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """The size of each named dim of a tensor of ``shape``. One name a dim that is not ``known`` is inferred.

        Errors: ValueError where the shape does not fit, saying which dim.
        """
        if len(shape) != len(self.groups):
            raise ValueError(f"{self.text!r} has {len(self.groups)} dims, the tensor {len(shape)}")
        found = {}
        for dim, (size, group) in enumerate(zip(shape, self.groups, strict=True)):
            unknown = [name for name in group if name not in known]
            product = prod(known[name] for name in group if name in known)
            given = " x ".join(f"{name}={known[name]}" for name in group if name in known)
            if not unknown and size != product:
                raise ValueError(f"dim {dim} must be {given}" + (f" = {product}" if len(group) > 1 else ""))
            if unknown and size % product:
                raise ValueError(f"dim {dim} must be a multiple of {given}")
            found.update({name: known.get(name, size // product) for name in group})
        return found

    def unflatten(self, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """``x`` with one dim a name; a view."""
        for dim in reversed(range(len(self.groups))):
            x = x.unflatten(dim, [sizes[name] for name in self.groups[dim]])
        return x

    def flatten(self, x: Tensor) -> Tensor:
        """The reverse of `unflatten`; a view where memory allows it."""
        for dim, group in enumerate(self.groups):
            x = x.flatten(dim, dim + len(group) - 1)
        return x


@cache
def parse(text: str) -> Pattern:
    """Read a pattern: names, and names in parentheses. Errors: UsageError for anything else, and for a name used twice."""
    words = re.findall(r"\([^()]*\)|\S+", text)
    groups = tuple(tuple(word[1:-1].split()) if word[0] == "(" and word[-1] == ")" else (word,) for word in words)
    names = [name for group in groups for name in group]
    if not names or not all(groups) or not all(name.isidentifier() for name in names):
        raise UsageError(f"pattern {text!r} must be names of dims, flattened ones in parentheses, as '(B T) S C'")
    if len(set(names)) < len(names):
        raise UsageError(f"pattern {text!r} names a dim twice; give each dim a name of its own")
    return Pattern(text, groups)
