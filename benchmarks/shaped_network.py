"""Runs a command as several ranks on this host, with a network of a chosen bandwidth between them.

    python benchmarks/shaped_network.py --network 200mbit --ranks 4 -- python benchmarks/end_to_end.py --network 200mbit

Each rank gets a network namespace of its own, joined to the others by a bridge. Both ends of its link are shaped by the
kernel's token buckets (`tc`), so bandwidth is what was asked for; latency is this host's. The network `loopback` needs none
of that: plain ranks on 127.0.0.1. `balanced` finds the bandwidth at which the switches of the plain method "dsp" take half
as long as its compute, forward and backward together; its command must be `end_to_end.py`.

The ranks find each other by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Where one fails, all are ended.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

FAST = "10gbit"  # so fast that compute and fixed costs are what is left
WANTED = 0.5  # of a balanced network: time of communication over time of compute
TOLERATED = 0.1
_POLL_SECONDS = 0.1
_SECONDS_TO_END = 5.0


class Place(NamedTuple):
    """Where a rank runs: what its command begins with, and the variables by which it finds its network."""

    prefix: list[str]
    environment: dict[str, str]


class Loopback:
    """All ranks in this host's own network."""

    def __init__(self, ranks: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        self.places = [Place([], found)] * ranks

    def open(self) -> None:
        """There is nothing to make."""

    def close(self) -> None:
        """There is nothing to clear up."""


class Shaped:
    """A namespace for each rank and one for the bridge between them, all named after this process."""

    def __init__(self, ranks: int, rate: str):
        self.rate = rate
        self._bridge = f"dsp{os.getpid()}-bridge"
        self._namespaces = [f"dsp{os.getpid()}-rank{rank}" for rank in range(ranks)]
        found = {"MASTER_ADDR": self._address(0), "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
        # torch warns of each address without a host name, and here none has one.
        found["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        self.places = [Place(["ip", "netns", "exec", namespace], found) for namespace in self._namespaces]

    def open(self) -> None:
        """Make the namespaces, their links and shapes; OSError where the kernel or its tools do not let it."""
        _call("ip", "netns", "add", self._bridge)
        _call("ip", "-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _call("ip", "-n", self._bridge, "link", "set", "bridge", "up")
        for rank, namespace in enumerate(self._namespaces):
            _call("ip", "netns", "add", namespace)
            self._join(rank, namespace)

    def close(self) -> None:
        """Delete what was made, also where `open` came to an early end; a link dies with the namespace of either end."""
        for namespace in (*self._namespaces, self._bridge):
            subprocess.run(["ip", "netns", "delete", namespace], stderr=subprocess.DEVNULL)

    def _join(self, rank: int, namespace: str) -> None:
        port = f"port{rank}"
        peer = ["type", "veth", "peer", "name", port, "netns", self._bridge]
        _call("ip", "-n", namespace, "link", "add", "eth0", *peer)
        _call("ip", "-n", namespace, "address", "add", f"{self._address(rank)}/16", "dev", "eth0")
        _call("ip", "-n", self._bridge, "link", "set", port, "master", "bridge")
        for where, device in ((namespace, "lo"), (namespace, "eth0"), (self._bridge, port)):
            _call("ip", "-n", where, "link", "set", device, "up")
        for where, device in ((namespace, "eth0"), (self._bridge, port)):
            shape = ["tbf", "rate", self.rate, "burst", "128kb", "latency", "200ms"]
            _call("tc", "-n", where, "qdisc", "add", "dev", device, "root", *shape)

    @staticmethod
    def _address(rank: int) -> str:
        return f"10.213.{rank // 250}.{rank % 250 + 1}"


def run(command: list[str], ranks: int, rate: str | None, *, show: bool = True) -> None:
    """Run ``command`` as so many ranks and wait for them; CalledProcessError where one fails. ``rate`` None: loopback."""
    network = Loopback(ranks) if rate is None else Shaped(ranks, rate)
    processes: list[subprocess.Popen] = []
    try:
        network.open()
        for rank, place in enumerate(network.places):
            numbers = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            environment = {**os.environ, **place.environment, **numbers}
            # A session of its own: so that all that a rank started can be ended with it.
            started = subprocess.Popen(
                [*place.prefix, *command],
                env=environment,
                stdout=None if show else subprocess.DEVNULL,
                start_new_session=True,
            )
            processes.append(started)
        _wait(processes)
    finally:
        with _undisturbed():
            _end(processes)
            network.close()


def run_balanced(command: list[str], ranks: int) -> None:
    """Find the rate at which communication takes half as long as compute, and run ``command`` there.

    The cost of the switches is a part that the rate does not change, measured on a fast network, and bytes / rate.
    """
    fast = _try(command, ranks, FAST)
    rate = _balanced_rate(fast, fast["exposed_ms"])
    print(f"balanced: compute {fast['compute_ms']:.0f} ms, {fast['sent_bytes'] / 1e6:.2f} MB sent by a rank", flush=True)
    found = _try(command, ranks, f"{rate}bit")
    if not _is_balanced(found):
        rate = _balanced_rate(found, found["exposed_ms"] - _milliseconds(found, rate))
    print(f"balanced: {rate / 1e6:.0f} Mbit/s between {ranks} ranks", flush=True)
    found = _measure(command, ranks, f"{rate}bit")
    print(f"balanced: communication took {found['exposed_ms'] / found['compute_ms']:.2f} of compute", flush=True)
    if not _is_balanced(found):
        print(f"balanced: that is not {WANTED}; something else may have run on this machine, run it again", flush=True)


def _try(command: list[str], ranks: int, rate: str) -> dict[str, Any]:
    """What plain DSP costs, of a short run that shows nothing and keeps no rows."""
    with tempfile.TemporaryDirectory() as folder:
        trial = ["--methods", "no_communication", "dsp", "--output", f"{folder}/rows.json"]
        return _measure([*command, *trial], ranks, rate, show=False)


def _measure(command: list[str], ranks: int, rate: str, *, show: bool = True) -> dict[str, Any]:
    """What plain DSP costs, as `end_to_end.py --summary` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.json"
        run([*command, "--summary", str(summary)], ranks, rate, show=show)
        return json.loads(summary.read_text())


def _milliseconds(found: dict[str, Any], rate: int) -> float:
    return found["sent_bytes"] * 8 / rate * 1000


def _balanced_rate(found: dict[str, Any], fixed_ms: float) -> int:
    """Bits a second at which ``fixed_ms`` and the sending of the bytes together are the wanted part of compute."""
    # Where fixed costs alone come near to the wanted part, no rate gives it: what can be done is to have them lead.
    for_bytes = max(WANTED * found["compute_ms"] - fixed_ms, 0.1 * found["compute_ms"])
    return round(found["sent_bytes"] * 8 / for_bytes * 1000)


def _is_balanced(found: dict[str, Any]) -> bool:
    return abs(found["exposed_ms"] / found["compute_ms"] - WANTED) <= TOLERATED


def _wait(processes: list[subprocess.Popen]) -> None:
    running = list(processes)
    while running:
        time.sleep(_POLL_SECONDS)
        for process in running:
            if process.poll():
                raise subprocess.CalledProcessError(process.returncode, process.args)
        running = [process for process in running if process.returncode is None]


def _end(processes: list[subprocess.Popen]) -> None:
    """End whatever is left of the ranks; those who do not listen are killed."""
    _signal(processes, signal.SIGTERM)
    patience = time.monotonic() + _SECONDS_TO_END
    while any(process.poll() is None for process in processes) and time.monotonic() < patience:
        time.sleep(_POLL_SECONDS)
    _signal(processes, signal.SIGKILL)
    for process in processes:
        process.wait()


def _signal(processes: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no impatient second signal keep the block from its end."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="loopback", help="loopback, balanced, or a rate as tc has it: 200mbit, 1gbit")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("command", nargs="+", help="the command of a rank, after --")
    arguments = parser.parse_args()
    if arguments.network != "loopback" and (os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc"))):
        sys.exit("error: a shaped network needs root, and ip and tc of iproute2; --network loopback needs neither")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    try:
        if arguments.network == "balanced":
            run_balanced(arguments.command, arguments.ranks)
        else:
            run(arguments.command, arguments.ranks, None if arguments.network == "loopback" else arguments.network)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
