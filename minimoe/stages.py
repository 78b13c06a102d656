"""Work in stages within one parallel loop: the threads meet between two stages instead of ending the loop.

To end a parallel loop and begin another was measured at 16 to 45 µs where threads sleep in between; a decoding step of
eight layers had 49 loops. Here threads enter one loop, and in it all go through the same stages. The work of a stage is
cut into numbered pieces; whoever is free takes the next one, and nobody goes on to the following stage before every
piece of this one is done:

    piece = begin(stage, pieces)
    while piece != NONE:
        ...                              # any piece, by any thread
        piece = go_on(stage, pieces)

A thread that comes late finds the work done by others; none ever waits for a piece that nobody has begun. So one
thread that runs is enough, whatever number was asked for; and what thread does a piece must make no difference to its
numbers. A piece must not raise: it would never be done.

They wait by looking again and again, as most stages take less time than it does to wake up. After LOOKS they offer
their core to others at each look: one of those may be the thread that they wait for.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimoe.loops import jit

NONE = -1
LOOKS = 2000  # some tens of microseconds
PIECES = 4  # for each thread, where work can be cut anywhere: with less, all would wait for the slowest core

_INT64 = ir.IntType(64)
_X86 = binding.get_default_triple().startswith(("x86_64", "i686"))


@jit()
def new_stages(count):
    """Counters for so many stages: of the pieces taken, and of those done, each in a line of memory of its own."""
    return np.zeros((count, 2, 16), np.int64)


@jit()
def pieces_for(threads):
    """Return how many pieces to cut work into that can be cut anywhere."""
    return PIECES * threads if threads > 1 else 1


@jit()
def begin(stage, pieces):
    """Take a piece of a stage; where all have been taken, wait until all are done and return NONE."""
    piece = _add_one(stage[0].ctypes.data)
    if piece < pieces:
        return piece
    looks = 0
    while _value(stage[1].ctypes.data) < pieces:
        if looks < LOOKS:
            looks += 1
            _pause()
        else:
            _offer_core()
    return NONE


@jit()
def go_on(stage, pieces):
    """Say that the piece which was taken is done, and take another: see `begin`."""
    _add_one(stage[1].ctypes.data)
    return begin(stage, pieces)


@jit()
def alone(stage):
    """Whether this thread is to do a stage of one piece, and then to call `done`; the others return when it is done."""
    return begin(stage, np.int64(1)) != NONE  # a literal would be a type of its own


@jit()
def done(stage):
    """Say that the only piece of a stage is done."""
    _add_one(stage[1].ctypes.data)


@intrinsic
def _add_one(typingctx: Any, place: Any) -> Any:
    """Add 1 to the int64 at an address and return what it was; what was written before is seen by who reads it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(_INT64, 1), "acq_rel")

    return types.int64(types.intp), codegen


@intrinsic
def _value(typingctx: Any, place: Any) -> Any:
    """Read the int64 at an address, and after it all that was written before it was increased."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _INT64.as_pointer()), "acquire", 8)

    return types.int64(types.intp), codegen


@intrinsic
def _pause(typingctx: Any) -> Any:
    """Tell an x86 processor that this loop waits: it saves power, and leaves more of the core to its other thread."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _offer_core(typingctx: Any) -> Any:
    """Let another thread run on this core, if one waits for it (POSIX; elsewhere the operating system sees to it)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if os.name == "posix":
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen
