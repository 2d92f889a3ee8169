"""What a stage of a model needs of the layout in which it runs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dsp.errors import UsageError


@dataclass(frozen=True)
class Attention:
    """Self-attention that can run over a sharded dim: by `embedded.ulysses`, and by `embedded.ring` where that takes it.

    Attributes:
        heads: query heads.
        head_bytes: bytes of one head at one position: head size x element size.
        key_value_heads: heads of keys and values, a divisor of ``heads``; None: as many as ``heads``.
        ring: whether `embedded.ring` may run it: plain softmax attention, by a kernel that it has. Ring also needs as many
            key and value heads as query heads and equal shards; where that fails it is not considered.
    """

    heads: int
    head_bytes: int
    key_value_heads: int | None = None
    ring: bool = False

    def __post_init__(self) -> None:
        for name, value in (("heads", self.heads), ("head_bytes", self.head_bytes), ("key_value_heads", self.groups)):
            if value < 1:
                raise UsageError(f"attention: {name}={value} must be at least 1")
        if self.heads % self.groups:
            raise UsageError(
                f"attention: heads={self.heads} over key_value_heads={self.groups}; the first must be a multiple of the second"
            )

    @property
    def groups(self) -> int:
        """Heads of keys and values; Ulysses shards these, each with its queries."""
        return self.heads if self.key_value_heads is None else self.key_value_heads


@dataclass(frozen=True)
class StageNeeds:
    """A part of a model and the dims that it mixes, which must be whole where it runs. It keeps the sizes of all dims.

    Attributes:
        name: for tables and errors.
        mixes: the dims along which positions depend on each other. Every stage mixes the channels; they are not named.
        attention: how it attends, where attention alone mixes these dims. Then one of them may stay sharded.
        may_run_whole: whether every rank may run it on the whole activation, which computes the same N times.
    """

    name: str
    mixes: tuple[str, ...]
    attention: Attention | None = None
    may_run_whole: bool = False
