"""Whether all ranks of a group are about to issue the same collective: ``"check_collectives"``."""

from __future__ import annotations

import hashlib
import time
import weakref
from collections import Counter
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist

from megatron_dsp.errors import RankError, UsageError


class Agreement:
    """Compares descriptions of collectives over a group before they are issued.

    ``every`` 1: each one, so that nothing can hang or mix up data; all wait for the slowest rank each time. More: that many at
    once, by their digest, which costs little; it finds ranks that issued different collectives and got through.
    """

    SECONDS = 30.0  # that a rank may come later than the others
    SAMPLED = 64  # collectives at once
    _WIDTH = 512  # bytes of a description that are compared
    _TAG = 0xD6  # keeps these messages apart from those of switches

    def __init__(self, group: dist.ProcessGroup, every: int = 1):
        self._group = weakref.ref(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._every = every
        self._descriptions: list[str] = []
        self._count = 0

    def check(self, description: str) -> None:
        """Errors: UsageError on every rank where descriptions differ; RankError on the others where a rank does not come."""
        self._count += 1
        self._descriptions.append(f"collective {self._count}: {description}")
        if len(self._descriptions) < self._every:
            return
        own, self._descriptions = self._descriptions, []
        if self._every > 1:
            digest = hashlib.sha256("\n".join(own).encode()).hexdigest()
            if len(set(self._exchange(digest, own[-1]).values())) == 1:
                return
        for text in own:
            self._compare(self._exchange(text, text))

    def _exchange(self, text: str, last: str) -> dict[int, str]:
        """Every rank's ``text``, by its global rank. ``last`` is what this rank has come to."""
        group = self._group()
        if group is None:
            raise RuntimeError("the process group of this collective was destroyed; make a new mesh")
        # On the CPU whatever is moved: the groups of a mesh have Gloo beside NCCL.
        message = torch.frombuffer(bytearray(text.encode()[: self._WIDTH].ljust(self._WIDTH)), dtype=torch.uint8)
        others = [rank for rank in range(len(self._ranks)) if rank != group.rank()]
        received = {rank: torch.empty_like(message) for rank in others}
        receives = [cast(dist.Work, dist.irecv(received[rank], group=group, group_src=rank, tag=self._TAG)) for rank in others]
        sends = [cast(dist.Work, dist.isend(message, group=group, group_dst=rank, tag=self._TAG)) for rank in others]
        deadline, absent = time.monotonic() + self.SECONDS, []
        for rank, work in zip(others, receives, strict=True):
            try:
                work.wait(timedelta(seconds=max(0.1, deadline - time.monotonic())))
            except RuntimeError:  # Gloo's, for a rank that is late as for one that is gone
                absent.append(self._ranks[rank])
        if absent:
            raise RankError(
                f"check_collectives: ranks {absent} did not come within {self.SECONDS:.0f} s to {last}; every rank must issue "
                "the same collectives in the same order: look at what these ranks did instead"
            )
        for work in sends:
            work.wait()
        texts = {self._ranks[rank]: bytes(text.tolist()).decode(errors="replace").rstrip() for rank, text in received.items()}
        texts[self._ranks[group.rank()]] = bytes(message.tolist()).decode(errors="replace").rstrip()
        return texts

    def _compare(self, texts: dict[int, str]) -> None:
        if len(set(texts.values())) > 1:
            expected = Counter(texts[rank] for rank in sorted(texts)).most_common(1)[0][0]
            actual = "; ".join(f"rank {rank} came to {texts[rank]}" for rank in sorted(texts) if texts[rank] != expected)
            raise UsageError(
                f"check_collectives: the ranks diverge. Expected, as most do or the first: {expected}. Actual: {actual}. Every "
                "rank must issue the same collectives in the same order"
            )
