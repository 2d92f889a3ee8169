"""Each wait of the code in chunks is taken away once, and a check has to find it: late transports show it on the CPU."""

from __future__ import annotations

import gc
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from overlap_cases import (
    HOW,
    SMALL,
    compare,
    forward,
    give_up_pass,
    overlap_of_case,
    run_case,
    run_chunked,
    small,
)
from overlap_transports import LateMessages, LateTransport, RecordingTransport, mutated, unraisable
from torch import Tensor, nn

from megatron_dsp import reshard
from megatron_dsp.reshard import Activation, Ends, Stage, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.stages import ends, legs, region
from megatron_dsp.reshard.transport import messages, torch_transport
from megatron_dsp.reshard.transport.move import Transport


def _late_values(reads_early: bool) -> list[str]:
    """What is wrong where nothing arrives before it is waited for. The same passes on all ranks, whatever they find."""
    exchange = exchange_of(dist.group.WORLD)
    wrong = []
    for along in HOW:
        case, parts = small(along)
        plain = run_case(case, parts, dist.group.WORLD)
        transport = LateTransport(exchange.transport, exchange.rank, reads_early=reads_early)
        try:
            compare(case, parts, run_chunked(case, parts, transport), plain)
        except Exception as error:
            wrong.append(f"{along}: {error!r}")
        if set(transport.ends) != {1}:
            wrong.append(f"{along}: transfers were ended so often: {transport.ends}")
    return wrong


def late_values() -> list[str]:
    return _late_values(False)


def late_values_read_early() -> list[str]:
    return _late_values(True)


def given_up() -> list[str]:
    """Transfers of a pass that was given up half way and that nobody waited for."""
    exchange = exchange_of(dist.group.WORLD)
    wrong = []
    for along in HOW:
        for give_up in ("forward", "backward", "checkpoint"):
            case, parts = small(along)
            transport = LateTransport(exchange.transport, exchange.rank)
            give_up_pass(case, parts, give_up, transport)
            if not transport.ends or set(transport.ends) != {1}:
                wrong.append(f"{along}, {give_up}: transfers were ended so often: {transport.ends}")
    return wrong


def twice() -> list[str]:
    """What is wrong with gradients of a graph that is gone back through twice: the second may not lie in the first."""
    wrong = []
    for along in HOW:
        case, parts = small(along, kind="identity", chain=("space", "time", "space"), start="space", channels=(2,) * 4)
        set_overlap(dist.group.WORLD, overlap_of_case(case))
        x = torch.randn_like(case.shard(case.tensors(2, 1, 1)[0], "space")).requires_grad_()
        y = forward(case, parts, reshard.Region(case.layout("space"), dist.group.WORLD), [], x)
        first, second = (torch.autograd.grad(y, x, torch.full_like(y, n), retain_graph=True)[0] for n in (1.0, 2.0))
        if not ((first == 1).all() and (second == 2).all()):
            wrong.append(f"{along}: {first.unique()}, {second.unique()}")
    set_overlap(dist.group.WORLD, None)
    return wrong


# What happens in which order, of three chunks of stages t, s and u, which have time, space and time sharded. Switches are
# numbered as they begin, forward and then backward; a computation is named by its stage and chunk.
ORDERS = {
    "sharded": (
        "t0 b0 t1 b1 t2 b2  e0 e1 e2  s0 b3 s1 b4 s2 b5  e3 e4 e5  u0 u1 u2",
        "u2 u1 u0  b6 b7 b8  e6 s2 e7 s1 e8 s0  b9 b10 b11  e9 t2 e10 t1 e11 t0",
    ),
    "batch": (
        "t0 b0 t1 b1 t2 b2  e0 s0 b3 e1 s1 b4 e2 s2 b5  e3 u0 e4 u1 e5 u2",
        "u2 b6 u1 b7 u0 b8  e6 s2 b9 e7 s1 b10 e8 s0 b11  e9 t2 e10 t1 e11 t0",
    ),
    "time": (
        "t0 b0 t1 b1 t2 b2  e0 e1 e2  s0  b3 b4 b5  e3 u0 e4 u1 e5 u2",
        "u2 b6 u1 b7 u0 b8  e8 e7 e6  s0  b9 b10 b11  e9 t2 e10 t1 e11 t0",
    ),
    "space": (
        "t0  b0 b1 b2  e0 s0 b3 e1 s1 b4 e2 s2 b5  e3 e4 e5  u0",
        "u0  b6 b7 b8  e6 s2 b9 e7 s1 b10 e8 s0 b11  e11 e10 e9  t0",
    ),
    # Of stages with ends, "ti" is what enters and "to" what leaves.
    "ends": (
        "ti0 to0 b0 to1 b1 to2 b2  e0 si0 e1 si1 e2 si2  so0 b3 so1 b4 so2 b5  e3 ui0 e4 ui1 e5 ui2 uo0",
        "uo0 ui2 b6 ui1 b7 ui0 b8  e6 so2 e7 so1 e8 so0  si2 b9 si1 b10 si0 b11  e9 to2 e10 to1 e11 to0 ti0",
    ),
    "leave": (
        "ti0 to0 b0 to1 b1 to2 b2  e0 e1 e2 si0  so0 b3 so1 b4 so2 b5  e3 e4 e5 ui0 uo0",
        "uo0 ui0 b6 b7 b8  e6 so2 e7 so1 e8 so0 si0  b9 b10 b11  e9 to2 e10 to1 e11 to0 ti0",
    ),
}


def orders() -> list[str]:
    """Orders that are not as written above."""
    exchange = exchange_of(dist.group.WORLD)
    usual = exchange.transport
    wrong = []
    for along, expected in ORDERS.items():
        log: list[str] = []
        exchange.transport = RecordingTransport(usual, log)
        case, _ = small(along)
        set_overlap(dist.group.WORLD, overlap_of_case(case))
        counts: Counter[str] = Counter()

        def compute(linear: nn.Linear, name: str, x: Tensor, counts: Counter[str] = counts, log: list[str] = log) -> Tensor:
            text = f"{name}{counts[name]}"
            counts[name] += 1
            log.append(text)
            y = linear(x)
            y.register_hook(lambda gradient: log.append(text))
            return y

        def with_ends(compute: Callable[..., Tensor], name: str, x: Activation, ends: Ends) -> Activation:
            entry, exit = (partial(compute, nn.Linear(2, 2), f"{name}{end}") for end in "io")
            return ends.leave(exit, *ends.enter(lambda chunk: (entry(chunk),), x))

        if case.cut == "stages":
            computes = [partial(compute, nn.Linear(2, 2), name) for name in "tsu"]
        else:
            computes = [partial(with_ends, compute, name) for name in "tsu"]
        stages = [
            Stage(run, sharded, has_ends=case.cut != "stages") for run, sharded in zip(computes, SMALL.chain, strict=True)
        ]
        shape = [size // 2 if dim == "time" else size for dim, size in zip(SMALL.dims, SMALL.sizes, strict=True)]
        y = reshard.Region(SMALL.layout("time"), dist.group.WORLD).run(stages, torch.randn(*shape, 2), independent="batch")
        forward = len(log)
        y.sum().backward()
        actual = [" ".join(part) for part in (log[:forward], log[forward:])]
        wrong += [f"{along}: {a}, not {e}" for a, e in zip(actual, expected, strict=True) if a.split() != e.split()]
    exchange.transport = usual
    set_overlap(dist.group.WORLD, None)
    return wrong


def kept() -> list[str]:
    """Legs that live on after a pass, or keep what has arrived after backward, of stages that are computed again."""
    case, parts = small("ends, computed again")
    set_overlap(dist.group.WORLD, overlap_of_case(case))
    gc.collect()
    gc.disable()
    wrong = []
    try:
        for backward in (True, False):
            x = case.shard(case.tensors(2, 1, 1)[0], "time").requires_grad_()
            y = forward(case, parts, reshard.Region(case.layout("time"), dist.group.WORLD), [], x)
            if backward:
                y.sum().backward()
                wrong += [f"{leg._kept.shape} is kept after backward" for leg in _legs() if leg._kept is not None]
            del y
            wrong += [f"{leg} lives on, backward: {backward}" for leg in _legs()]
        return wrong
    finally:
        gc.enable()
        set_overlap(dist.group.WORLD, None)


def _legs() -> list[legs.Leg]:
    return [each for each in gc.get_objects() if type(each).__name__ == "Leg"]


def late_messages(mutant: ModuleType) -> list[str]:
    """What is wrong with switches made of messages, as in ``mutant``, where none arrives before it is waited for."""
    mutant.dist = late = LateMessages()
    return _late(torch_transport.TorchTransport(dist.group.WORLD), late)


def late_all_to_all(mutant: ModuleType) -> list[str]:
    """The same for switches as an all-to-all."""
    late = LateMessages()
    mutant._all_to_all = late.all_to_all
    transport = mutant.TorchTransport(dist.group.WORLD)
    transport._find_route = lambda moves: mutant.AllToAll(moves, dist.get_rank())
    return _late(transport, late)


def _late(transport: Transport, late: LateMessages) -> list[str]:
    wrong = []
    for along in (None, *HOW):  # None: whole stages
        case, parts = small(along or "sharded", chunks=3 if along else 1)
        plain = run_case(case, parts, dist.group.WORLD)
        try:
            compare(case, parts, run_chunked(case, parts, transport), plain)
        except Exception as error:
            wrong.append(f"{along}: {error!r}")
        late.settle()
    if late.unwaited or late.freed:
        wrong.append(f"{late.unwaited} messages nobody waited for, {late.freed} freed before")
    return wrong


class Mutation(NamedTuple):
    module: ModuleType
    old: str
    new: str
    checks: tuple[str, ...]  # which have to find something wrong with it
    sentence: str


VALUES = ("late_values", "late_values_read_early")
WAIT_FOR_ARRIVALS = """        for leg in legs:
            leg.wait()
        return legs[0].take()
"""
WAIT_FOR_GRADIENTS = """        for leg in ctx.legs:
            leg.wait()
        return None, ctx.legs[0].source.take()
"""
GIVEN_UP = "        with torch.inference_mode():  # it may write to tensors of that mode, and to all others\n"
ENTER = """        for number, (leg, token) in enumerate(zip(way.legs, x, strict=True)):
            # Made just before it is computed on: so in backward its gradient leaves as soon as it is computed.
            chunk = self._complete(legs.end([leg], [token]))
"""
RECEIVE = """                work.wait()
                if message is not place:
                    place.copy_(message)
"""
SENT = """            for work, _ in sends:
                work.wait()
"""

MUTATIONS = {
    "arrivals: no wait": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        "        return legs[0].take()\n",
        VALUES,
        "A stage computes on memory into which nothing has come yet.",
    ),
    "arrivals: the first one's wait alone": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        WAIT_FOR_ARRIVALS.replace("in legs:", "in legs[:1]:"),
        VALUES,
        "Of the chunks that arrive in one tensor, the later ones are missing.",
    ),
    "arrivals: the last one's wait alone": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        WAIT_FOR_ARRIVALS.replace("in legs:", "in legs[-1:]:"),
        VALUES,
        "Of the chunks that arrive in one tensor, the earlier ones are missing: the order of begin is not one of arrival.",
    ),
    "arrivals: read before the wait": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        "        arrived = legs[0].take().clone()\n" + WAIT_FOR_ARRIVALS.replace("legs[0].take()", "arrived"),
        VALUES,
        "All transfers are waited for, but what is given on was read before.",
    ),
    "gradients: no wait": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        "        return None, ctx.legs[0].source.take()\n",
        VALUES,
        "A stage goes backward from memory into which no gradient has come yet.",
    ),
    "gradients: the first one's wait alone": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        WAIT_FOR_GRADIENTS.replace("in ctx.legs:", "in ctx.legs[:1]:"),
        VALUES,
        "Of a stage that ran whole and left in chunks, the gradients of the later chunks are missing.",
    ),
    "gradients: the last one's wait alone": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        WAIT_FOR_GRADIENTS.replace("in ctx.legs:", "in ctx.legs[-1:]:"),
        VALUES,
        "Of a stage that ran whole and left in chunks, the gradients of the earlier chunks are missing.",
    ),
    "gradients: read before the wait": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        "        arrived = ctx.legs[0].source.take().clone()\n"
        + WAIT_FOR_GRADIENTS.replace("ctx.legs[0].source.take()", "arrived"),
        VALUES,
        "All transfers are waited for, but the gradient that is given on was read before.",
    ),
    "a leg's wait does not end its transfer": Mutation(
        legs,
        "                end()\n",
        "                pass\n",
        (*VALUES, "given_up"),
        "Nothing ever waits for the transport.",
    ),
    "a leg's wait can end a transfer twice": Mutation(
        legs,
        "end, self._end = self._end, None",
        "end = self._end",
        VALUES,
        "The end of a transport is called again when the leg is freed; it is to be called once.",
    ),
    "a leg that is given up does not wait": Mutation(
        legs,
        GIVEN_UP + "            self.wait()\n",
        GIVEN_UP + "            pass\n",
        ("given_up",),
        "Of a pass that was given up half way, memory is freed into which a transfer still writes.",
    ),
    "memory of one pass serves the next": Mutation(
        legs,
        "memory, self._memory = self._memory, None",
        "memory = self._memory",
        ("twice",),
        "A second pass back through a graph writes into the gradients that the first one gave.",
    ),
    "half of the chunks of a tensor are ended": Mutation(
        region,
        "legs.end(ways, done)",
        "legs.end(ways[:1], done[:1])",
        VALUES,
        "A stage computes on a tensor of which only the first chunk was asked for.",
    ),
    "a switch ends as it begins": Mutation(
        legs,
        "label, sent, beside=beside)\n",
        "label, sent, beside=beside)\n        self.wait()\n",
        ("orders",),
        "Values are right, but nothing travels beside compute.",
    ),
    "gradients leave in the order of forward": Mutation(
        legs,
        "for leg in reversed(ctx.legs):",
        "for leg in ctx.legs:",
        ("orders",),
        "Values are right, but the first chunk that backward needs is the last to travel.",
    ),
    "all slices are ended before the first computes": Mutation(
        region,
        "arriving = (self.complete(legs.end([way], [token])) for way, token in zip(ways, done, strict=True))",
        "arriving = iter([self.complete(legs.end([way], [token])) for way, token in zip(ways, done, strict=True)])",
        ("orders",),
        "Values are right, but slices are waited for long before they are needed.",
    ),
    "what is computed again is sent again": Mutation(
        legs,
        "        if self._begun:\n            return\n",
        "",
        ("late_values",),
        "Activation checkpointing within a stage would move its chunks twice.",
    ),
    "what has arrived is not kept": Mutation(
        legs,
        "            if not self.ends_again:\n                return target\n",
        "            return target\n",
        ("late_values",),
        "A stage that is computed again finds no activation.",
    ),
    "what is kept holds the graph": Mutation(
        legs,
        "return self._kept.detach()",
        "return self._kept",
        ("kept",),
        "A graph that holds a leg that holds the graph is freed by the garbage collector alone, and with it all activations.",
    ),
    "what is under way holds the graph": Mutation(
        legs,
        "            x = x.detach()  #",
        "            pass  #",
        ("given_up",),
        "A stage that is computed again and fails would leave a transfer that nobody waits for.",
    ),
    "what has arrived is kept too long": Mutation(
        legs,
        "        self._kept = None\n        into = self.source",
        "        into = self.source",
        ("kept",),
        "Activations stay after the backward of their stage.",
    ),
    "all chunks are ended before one enters": Mutation(
        ends,
        ENTER,
        "        x = [legs.end([leg], [token]) for leg, token in zip(way.legs, x, strict=True)]\n"
        "        for number, chunk in enumerate(x):\n",
        ("orders",),
        "Values are right, but in backward all chunks are computed before a gradient leaves.",
    ),
    "all chunks are computed before one leaves": Mutation(
        ends,
        "            tokens += legs.begin([leg], self._part(y))\n        return tuple(tokens)\n",
        "            tokens.append(y)\n"
        "        return sum((legs.begin([leg], self._part(y)) for leg, y in zip(way.legs, tokens)), ())\n",
        ("orders",),
        "Values are right, but no chunk travels while the next one is computed.",
    ),
    "transport: no wait for receives": Mutation(
        messages,
        RECEIVE,
        RECEIVE.replace("                work.wait()\n", ""),
        ("late_messages",),
        "A message is unpacked before it has come.",
    ),
    "transport: received messages stay packed": Mutation(
        messages,
        RECEIVE,
        "                work.wait()\n",
        ("late_messages",),
        "What came into staging memory is not brought to its place.",
    ),
    "transport: no wait for sends": Mutation(
        messages,
        SENT,
        "            pass\n",
        ("late_messages",),
        "Sources and messages can be freed or changed while they are being sent.",
    ),
    "all-to-all: no wait": Mutation(
        torch_transport,
        "        work.wait()\n        sent.clear()",
        "        sent.clear()",
        ("late_all_to_all",),
        "Messages are unpacked before the collective has written them.",
    ),
    "all-to-all: messages are not kept": Mutation(
        torch_transport,
        "results, [message, *xs])",
        "results, [])",
        ("late_all_to_all",),
        "Packed messages are freed while the collective reads them.",
    ),
    "all-to-all, whole: no wait": Mutation(
        torch_transport,
        "            work.wait()\n        if received",
        "            pass\n        if received",
        ("late_all_to_all",),
        "A backend that does not wait by itself writes while messages are unpacked.",
    ),
    "all-to-all: what has come is not unpacked": Mutation(
        torch_transport,
        "        self._unpack(arriving, results)\n        return results\n",
        "        return results\n",
        ("late_all_to_all",),
        "What came into staging memory is not brought to its place.",
    ),
}
LATE = {check.__name__: check for check in (late_messages, late_all_to_all)}
CHECKS: dict[str, Callable[..., list[str]]] = {
    **{check.__name__: check for check in (late_values, late_values_read_early, given_up, twice, orders, kept)},
    **LATE,
}


def _check(names: Sequence[str], mutation: str | None) -> list[list[str]]:
    """What each of these checks finds wrong, in the package as it is or as it is mutated."""
    found = []
    for name in names:
        needed = {"late_messages": messages, "late_all_to_all": torch_transport}.get(name, legs)
        module, old, new = (needed, "", "") if mutation is None else MUTATIONS[mutation][:3]
        with mutated(module, old, new) as mutant, unraisable() as errors:
            check = CHECKS[name]
            wrong = check(mutant) if name in LATE else check()
        found.append(wrong + errors)
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_nothing_is_wrong_where_nothing_is_early(ranks, size):
    checks = list(CHECKS)
    if size != 2:
        checks.remove("orders")  # they are written down for two ranks
    for found in ranks(size, _check, checks, None):
        assert dict(zip(checks, found, strict=True)) == {check: [] for check in checks}


@pytest.mark.parametrize(
    "mutation", [pytest.param(name, marks=[pytest.mark.long] * (index % 2)) for index, name in enumerate(MUTATIONS)]
)
def test_mutations_are_found(ranks, mutation):
    _, _, _, checks, sentence = MUTATIONS[mutation]
    for found in ranks(2, _check, checks, mutation):
        for check, wrong in zip(checks, found, strict=True):
            assert wrong, f"{check} does not find: {sentence}"


def test_every_wait_has_a_mutation():
    """Those of `side_stream` are in tests/gpu."""
    for module, least in ((legs, 3), (messages, 2), (torch_transport, 2)):
        source = inspect.getsource(module)
        waits = [match.end() - 1 for match in re.finditer(r"^ +(\w+\.)?(wait|end)\(\)$", source, re.MULTILINE)]
        assert len(waits) >= least
        mutated_parts = [
            range(source.index(old), source.index(old) + len(old)) for of, old, *_ in MUTATIONS.values() if of is module
        ]
        for wait in waits:
            line = source[:wait].count("\n") + 1
            assert any(wait in part for part in mutated_parts), f"no mutation of {module.__name__}, line {line}"
