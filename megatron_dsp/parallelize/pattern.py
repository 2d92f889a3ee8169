"""Patterns name the dims of a tensor: ``"(B T) 1+S C"`` has three.

The first is B and T flattened in this order, the second one token beside the S that follow it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TypeAlias

from torch import Tensor

from megatron_dsp.errors import UsageError

Term: TypeAlias = int | tuple[str, ...]  # a number of tokens, or names that are flattened into one
_NAME = r"[^\W\d]\w*"
_TERM = rf"(?:\d+|{_NAME}|\(\s*{_NAME}(?:\s+{_NAME})*\s*\))"
_DIM = rf"{_TERM}(?:\+{_TERM})*"
_PATTERN = re.compile(rf"\s*{_DIM}(?:\s+{_DIM})*\s*")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern; made by `parse`.

    Attributes:
        text: as it was written.
        dims: for each dim of the tensor, the terms that lie in it one after another.
    """

    text: str
    dims: tuple[tuple[Term, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in storage order."""
        return tuple(name for terms in self.dims for name in _names(terms))

    @property
    def sums(self) -> tuple[int, ...]:
        """The dims that consist of several terms."""
        return tuple(dim for dim, terms in enumerate(self.dims) if len(terms) > 1)

    def dim_of(self, name: str) -> int:
        """The dim of the flattened tensor in which ``name`` lies."""
        return next(dim for dim, terms in enumerate(self.dims) if name in _names(terms))

    def sizes(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """The size of each named dim of a tensor of ``shape``. One name a dim that is not ``known`` is inferred.

        Errors: ValueError where the shape does not fit, saying which dim.
        """
        if len(shape) != len(self.dims):
            raise ValueError(f"{self.text!r} has {len(self.dims)} dims, the tensor {len(shape)}")
        found = {}
        for dim, (size, terms) in enumerate(zip(shape, self.dims, strict=True)):
            unknown = [term for term in terms if not isinstance(term, int) and not all(name in known for name in term)]
            rest = size - sum(_size(term, known) for term in terms if term not in unknown)
            given = " + ".join(_describe(term, known) for term in terms)
            if not unknown and rest:
                whole = size - rest
                raise ValueError(f"dim {dim} must be {given}" + (f" = {whole}" if " " in given else ""))
            for term in unknown:
                product = prod(known[name] for name in term if name in known)
                if rest < 0 or rest % product:
                    raise ValueError(f"dim {dim} must be {'a multiple of ' if len(terms) == 1 else ''}{given}")
                found.update({name: rest // product for name in term if name not in known})
            found.update({name: known[name] for name in _names(terms) if name in known})
        return found

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """That of a tensor whose named dims have these sizes."""
        return tuple(sum(_size(term, sizes) for term in terms) for terms in self.dims)

    def with_dim_after(self, name: str, new: str) -> Pattern:
        """The pattern in which ``name`` is flattened with a dim ``new`` within it."""

        def widen(term: Term) -> Term:
            if isinstance(term, int) or name not in term:
                return term
            at = term.index(name) + 1
            return (*term[:at], new, *term[at:])

        return Pattern(self.text, tuple(tuple(map(widen, terms)) for terms in self.dims))

    def unflatten(self, x: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """``x`` with one dim a name; a view. A dim of several terms stays one."""
        for dim in reversed(range(len(self.dims))):
            names = self._names_within(dim)
            if len(names) > 1:
                x = x.unflatten(dim, [sizes[name] for name in names])
        return x

    def flatten(self, x: Tensor) -> Tensor:
        """The reverse of `unflatten`; a view where memory allows it."""
        for dim in range(len(self.dims)):
            x = x.flatten(dim, dim + max(len(self._names_within(dim)), 1) - 1)
        return x

    def narrow(self, x: Tensor, sizes: Mapping[str, int], name: str, start: int, stop: int) -> Tensor:
        """The elements from ``start`` to ``stop`` of the dim ``name``; all of ``x`` where it has no such dim."""
        if name not in self.names:
            return x
        return self.flatten(self.unflatten(x, sizes).narrow(self.index(name), start, stop - start))

    def index(self, name: str) -> int:
        """The dim of the unflattened tensor that ``name`` is."""
        dim = self.dim_of(name)
        before = sum(max(len(self._names_within(earlier)), 1) for earlier in range(dim))
        return before + self._names_within(dim).index(name)

    def parts(self, dim: int, sizes: Mapping[str, int]) -> list[tuple[int, Pattern]]:
        """Of a dim of several terms: the size of each term, and the pattern of that part of the tensor."""
        parts = []
        for term in self.dims[dim]:
            dims = (*self.dims[:dim], (term,), *self.dims[dim + 1 :])
            parts.append((_size(term, sizes), Pattern(self.text, dims)))
        return parts

    def _names_within(self, dim: int) -> tuple[str, ...]:
        return _names(self.dims[dim]) if len(self.dims[dim]) == 1 else ()


@cache
def parse(text: str) -> Pattern:
    """Read a pattern. Errors: UsageError where it is none, for a name used twice, and for two dims of several terms."""
    if not _PATTERN.fullmatch(text):
        raise UsageError(
            f"pattern {text!r} must be names of dims, flattened ones in parentheses, tokens beside others with +: '(B T) 1+S C'"
        )
    pattern = Pattern(text, tuple(tuple(map(_term, re.findall(_TERM, dim))) for dim in re.findall(_DIM, text)))
    if len(set(pattern.names)) < len(pattern.names):
        raise UsageError(f"pattern {text!r} names a dim twice; give each dim a name of its own")
    if len(pattern.sums) > 1:
        raise UsageError(f"pattern {text!r} has two sums; tokens beside others are served in one dim of a tensor")
    return pattern


def _term(text: str) -> Term:
    return int(text) if text.isdigit() else tuple(text.strip("()").split())


def _names(terms: Sequence[Term]) -> tuple[str, ...]:
    return tuple(name for term in terms if not isinstance(term, int) for name in term)


def _size(term: Term, sizes: Mapping[str, int]) -> int:
    return term if isinstance(term, int) else prod(sizes[name] for name in term)


def _describe(term: Term, known: Mapping[str, int]) -> str:
    if isinstance(term, int):
        return str(term)
    return " x ".join(f"{name}={known[name]}" for name in term if name in known) or " x ".join(term)
