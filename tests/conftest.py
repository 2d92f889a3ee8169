from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from ranks import RankPool

# Before torch is imported, here and in every process that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """``ranks(n, function, *arguments)`` runs a function of a test module on n ranks; see ranks.py."""
    pool = RankPool()
    yield pool
    pool.close()
