"""A part of a model that needs certain dims whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_dsp.reshard.labels import StageName


class Stage(NamedTuple):
    """A part of a model that runs with one dim sharded, which it does not mix.

    ``compute`` gets the activation, or a chunk of it along a dim that it does not mix, and returns it in the same sizes, those
    of the last dim aside. Side inputs it takes from `Region.local`, which knows of the chunk.

    A stage that ``has_ends`` gets `Ends` too, and does what treats tokens alone through them: ``compute(x, ends)``. It leaves
    ``x`` as it is until it gives it to `Ends.enter`, and returns what `Ends.leave` gives.

    A stage that ``mixes_sharded`` attends over the dim that is sharded, with collectives of its own (`embedded`): it and the
    stages around it run whole.

    ``recomputes`` tells of a stage with ends that it computes again in backward, as under activation checkpointing: what has
    arrived is kept for it.

    ``name`` is its kind, as "temporal", and ``number`` its number among those of its kind: ledgers, profiles and what is
    measured sum up over a kind.
    """

    compute: Callable[..., Any]
    sharded: str
    name: str = ""
    mixes_sharded: bool = False
    number: int | None = None
    has_ends: bool = False
    recomputes: bool = False

    @property
    def label(self) -> StageName:
        """What the stage is called."""
        return StageName(self.name, self.number)
