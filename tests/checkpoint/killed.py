"""Kill a child right before one of its changes to the file system, by ptrace: no change is missed, and none is half done."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import struct
import traceback
from collections.abc import Callable

import pytest

# Of linux/ptrace.h.
_TRACEME, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
_ENTRY = 1
_INFO = struct.Struct("<B3xIQQQ6Q")  # what of, architecture, two pointers, number of the call, its arguments
# The numbers of system calls: those that change the file system; and those that open files, with the places of their flags.
_CALLS = {
    "x86_64": ({1, 18, 20, 74, 75, 77, 82, 83, 84, 85, 86, 87, 88, 258, 263, 264, 265, 266, 296, 316}, {2: 1, 257: 2}),
    "aarch64": ({34, 35, 36, 37, 38, 46, 64, 66, 68, 70, 82, 83, 276}, {56: 2}),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def run(function: Callable[[], None], before: int | None = None) -> int:
    """Run ``function`` in a forked child, and kill that -9 right before its ``before``-th change (from 1 on), if there is one.

    Changes are writes, flushes, renames, removals, new folders, and openings for writing. Returns how many were begun. Errors:
    AssertionError where the function raises. The test is skipped where ptrace is not permitted.
    """
    if platform.system() != "Linux" or platform.machine() not in _CALLS:
        pytest.skip(f"the system calls of {platform.system()} on {platform.machine()} are not known here")
    child = os.fork()
    if child == 0:
        _be_traced(function)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        pytest.skip("ptrace is not permitted here")
    try:
        _ptrace(_SETOPTIONS, child, 0, _TRACESYSGOOD | _EXITKILL)
        return _follow(child, before)
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _follow(child: int, before: int | None) -> int:
    begun, passed_on = 0, 0
    while begun != before:
        _ptrace(_SYSCALL, child, 0, passed_on)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the function raised; see stderr"
            break
        assert os.WIFSTOPPED(status), f"ended by signal {os.WTERMSIG(status)}"
        at_call = os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
        passed_on = 0 if at_call else os.WSTOPSIG(status)
        begun += at_call and _changes(child)
    return begun


def _be_traced(function: Callable[[], None]) -> None:
    status = 1
    try:
        if _libc.ptrace(_TRACEME, 0, None, None) != 0:
            os._exit(2)
        os.kill(os.getpid(), signal.SIGSTOP)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _changes(child: int) -> bool:
    """Whether the child is about to enter a system call that changes the file system."""
    info = ctypes.create_string_buffer(_INFO.size)
    _ptrace(_GET_SYSCALL_INFO, child, _INFO.size, ctypes.addressof(info))
    kind, _, _, _, number, *arguments = _INFO.unpack(info.raw)
    changing, opening = _CALLS[platform.machine()]
    if kind != _ENTRY or number not in opening:
        return kind == _ENTRY and number in changing
    return bool(arguments[opening[number]] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _ptrace(request: int, child: int, address: int, data: int) -> None:
    if _libc.ptrace(request, child, address, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}: {os.strerror(ctypes.get_errno())}")
