"""A pool of ranks that lives for a test session: starting a process costs seconds, sending it a function does not.

    results = ranks(3, function, *arguments)      # function(*arguments) on 3 ranks; the list of what they return

Each call gives its ranks a fresh torch.distributed world of their number, over Gloo, and ends it afterwards. Functions are
sent by name: they must stand at the top level of a test module.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 120  # seconds that a function may take
GRACE = 3  # seconds that the others get to fail as well, after one has failed


class RankPool:
    """Callable: ``pool(n, function, *arguments, **keywords)``."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._stores = tempfile.TemporaryDirectory()
        self._calls = 0

    def __call__(self, size: int, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> list[Any]:
        while len(self._workers) < size:
            self._workers.append(self._start())
        self._calls += 1
        store = str(Path(self._stores.name) / str(self._calls))
        # By name, and with copies of tensors instead of handles to shared memory.
        call = pickle.dumps((function.__module__, function.__qualname__, arguments, keywords))
        pipes = [pipe for _, pipe in self._workers[:size]]
        for rank, pipe in enumerate(pipes):
            pipe.send_bytes(pickle.dumps((rank, size, store, call)))
        return self._collect(function.__qualname__, pipes)

    def _collect(self, name: str, pipes: list[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(results) + len(errors) < len(pipes):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in errors]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pipes.index(pipe)
                try:
                    ok, payload = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, payload = False, "the process died"
                (results if ok else errors)[rank] = payload
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = [rank for rank in range(len(pipes)) if rank not in results and rank not in errors]
        if errors or silent:
            self.close()
            report = "".join(f"\n--- rank {rank}:\n{error}" for rank, error in sorted(errors.items()))
            raise AssertionError(f"{name} failed on ranks {sorted(errors)}, no answer from ranks {silent}{report}")
        return [results[rank] for rank in range(len(pipes))]

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = mp.Pipe()
        process = mp.get_context("spawn").Process(target=_serve, args=(theirs, sys.path))
        process.start()
        theirs.close()
        return process, ours

    def close(self) -> None:
        """End all processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    while True:
        try:
            rank, size, store, call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer = True, _call(rank, size, store, call)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def _call(rank: int, size: int, store: str, call: bytes) -> Any:
    import importlib

    import torch
    import torch.distributed as dist

    from megatron_dsp import mesh

    torch.set_num_threads(1)
    torch.manual_seed(0)  # whatever these ranks ran before
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    try:
        module, name, arguments, keywords = pickle.loads(call)
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)
    finally:
        mesh._current = None
        if "deepspeed" in sys.modules:
            _reset_deepspeed()
        gc.collect()
        dist.destroy_process_group()


def _reset_deepspeed() -> None:
    """Undo what DeepSpeed leaves in a process, as if each test ran in a new one.

    Its record of the world; its numbering of modules and parameters (ranks that took part in different tests must agree);
    and ZeRO 3's replacement of torch's linear, with which a later ZeRO 2 run in the same process trains wrongly.
    """
    import torch
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload, partition_parameters

    comm.cdb = None
    torch.nn.functional.linear = torch._C._nn.linear
    partition_parameters.Init.param_id = 0
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
