"""What a plan is made of: what a module needs, its side inputs and outputs, and where the region begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from megatron_dsp.parallelize.pattern import Pattern, parse

Key: TypeAlias = int | str  # an argument by position or by name; an item of an output
ArgumentOrItem: TypeAlias = Key | tuple[Key, ...]  # several: an argument, then an item of that tuple, list or dict, and so on

HEADS = "heads"  # the dim of attention heads in Needs.attention


@dataclass(frozen=True)
class Slice:
    """What every rank holds whole. The module gets the part that belongs to its shard."""

    pattern: str


@dataclass(frozen=True)
class Carried:
    """A side input that is sharded as the activation is outside the module, and moves along with it."""

    pattern: str


@dataclass(frozen=True)
class LocalSize:
    """A number: the size of ``dim``. The module gets the size of the part that it sees."""

    dim: str


@dataclass(frozen=True)
class Computed:
    """The module gets ``value(sizes)``, of the sizes of dims as it sees them, instead of what is passed."""

    value: Callable[[Mapping[str, int]], Any]


@dataclass(frozen=True)
class Reduced:
    """An output that is reduced over dim ``over``, of which the module sees a part. An all-reduce makes it that of the whole.

    Where the pattern does not name ``over``, the module has reduced over it. Where it does, the model takes the mean over it
    after the module: each element becomes the mean of all, so that the mean of a part is that of the whole. Of a sum of terms,
    as "(B T) 1+S C", this is done to the tokens that stand beside.
    """

    pattern: str
    over: str
    by: Literal["sum", "mean"] = "sum"


SideInput: TypeAlias = Slice | Carried | LocalSize | Computed


@dataclass(frozen=True)
class Needs:
    """How a module takes its activation, and what it needs whole.

    Attributes:
        pattern: of the activation that goes in, and of the one that comes out where ``outputs`` is empty.
        whole: the dim or dims that it mixes.
        arguments: its side inputs, by position or by name. One that is not passed, or is None, is left alone.
        activation: the argument that is the activation.
        outputs: where it returns a tuple, list or dict: the items that are activations, with their patterns.
        least: elements of the sharded dim that it must find on each rank.
        attention: the pattern of the queries in its calls of ``torch.nn.functional.scaled_dot_product_attention``, with a dim
            named "heads". They attend over all ranks' tokens where the dim before the last is sharded.
    """

    pattern: str
    whole: str | tuple[str, ...] = ()
    arguments: Mapping[ArgumentOrItem, SideInput] = field(default_factory=dict)
    activation: ArgumentOrItem = 0
    outputs: Mapping[ArgumentOrItem, str | Reduced] = field(default_factory=dict)
    least: int = 1
    attention: str | None = None

    @property
    def mixes(self) -> tuple[str, ...]:
        """``whole`` as a tuple."""
        return (self.whole,) if isinstance(self.whole, str) else tuple(self.whole)

    @property
    def attends(self) -> tuple[str, ...]:
        """The dims over which ``attention`` runs, on whichever rank their parts are."""
        tokens = () if self.attention is None else parse(self.attention).dims[-2]
        return tuple(name for term in tokens if not isinstance(term, int) for name in term)

    @property
    def patterns(self) -> list[Pattern]:
        """All of its patterns, the activation's first."""
        named: list[Any] = [*self.arguments.values(), *self.outputs.values()]
        texts = [side.pattern for side in named if isinstance(side, (Slice, Carried, Reduced))]
        return [parse(text) for text in (self.pattern, *texts, *(text for text in named if isinstance(text, str)))]


@dataclass(frozen=True)
class Boundary:
    """Where activations become shards, or whole again: before a module, in its arguments; or after it, in its outputs.

    Attributes:
        module: its name in ``model.named_modules()``; "" is the model.
        tensors: which arguments, or items of the output (0 if it is one tensor), with their patterns; the activation first.
        after: after the module, not before it.
    """

    module: str
    tensors: Mapping[ArgumentOrItem, str]
    after: bool = False
