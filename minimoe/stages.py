"""Work in stages within one parallel loop: the threads meet between two stages instead of ending the loop.

To end a parallel loop and begin another was measured at 16 to 45 µs where threads sleep in between; a decoding step of
eight layers had 49 loops. Here threads enter one loop, and in it all go through the same stages. The work of a stage is
cut into numbered pieces; whoever is free takes the next one, and nobody goes on to the following stage before every
piece of this one is done:

    piece = begin(stage, pieces)
    while piece != NONE:
        ...                              # any piece, by any thread
        piece = go_on(stage, pieces)

A thread that comes late finds the work done by others; none ever waits for a piece that nobody has begun. So it does
not matter how many of the threads really run at once, one is enough; and what thread does a piece must make no
difference to its numbers.

They wait by looking again and again, without giving up their core: stages are shorter than it takes to wake up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimoe.loops import jit

NONE = -1
ONE = np.int64(1)  # piece, of a stage that one thread does while the others wait: a literal would be a type of its own
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
    """Take a piece of a stage; NONE where all have been taken, but not before all are done."""
    piece = _add_one(stage[0].ctypes.data)
    if piece < pieces:
        return piece
    while _value(stage[1].ctypes.data) < pieces:
        _pause()
    return NONE


@jit()
def go_on(stage, pieces):
    """Say that the piece which was taken is done, and take another: see `begin`."""
    _add_one(stage[1].ctypes.data)
    return begin(stage, pieces)


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
