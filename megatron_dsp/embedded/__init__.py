"""Attention over the sharded dim itself, for stages that attend over it."""

from megatron_dsp.embedded.ring import ring
from megatron_dsp.embedded.ulysses import ulysses, ulysses_in_chunks

__all__ = ["ring", "ulysses", "ulysses_in_chunks"]
