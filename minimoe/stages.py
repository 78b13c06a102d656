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
numbers. A piece must not raise: it would never be done, and others would wait for it.

`together` lets threads enter, from jitted code: each calls the same function with the same arguments, and finds by the
counters of stages what there is to do. Where rows do not depend on each other, `share` deals them out beforehand. Who
calls jitted code that uses these asks Numba for the number of threads first (see `threads_if`).

They wait by looking again and again, as most stages take less time than it does to wake up. After LOOKS they offer
their core to others at each look: one of those may be the thread that they wait for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimoe.loops import call, jit

NONE = -1
LOOKS = 2000  # some tens of microseconds
SMALL = 1 << 17  # numbers that a core copies or scales before another has woken up: to wake takes 7 to 50 µs
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
def take(stage, pieces):
    """Take a piece of a stage, or NONE where all have been taken; who waits for nobody need not say that it is done."""
    piece = _add_one(stage[0].ctypes.data)
    return piece if piece < pieces else NONE


@jit()
def begin(stage, pieces):
    """Take a piece of a stage; where all have been taken, wait until all are done and return NONE."""
    piece = take(stage, pieces)
    if piece != NONE:
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


@jit(parallel=True)
def enter(function, argument, threads):
    """Call the function at an address, which takes one int64, once for each thread."""
    for _ in numba.prange(threads):
        call(function, argument)


@jit(parallel=True)
def _enter_with_rows(function, argument, rows, threads):
    """Call the function at an address, which takes `argument`, start and stop, for each thread's part of the rows."""
    for i in numba.prange(threads):
        part = np.int64(i)  # prange counts unsigned
        call(function, argument, rows * part // threads, rows * (part + 1) // threads)


@intrinsic
def together(typingctx: Any, function: Any, arguments: Any, threads: Any) -> Any:
    """Call a jitted function with a tuple of arguments once for each thread, inside jitted code; wait for all of them.

    In a parallel loop Numba would compile the function, and all it calls, once more in each of three layers around the
    loop's body, which takes most of the time. Here the loop, that of `enter`, knows an address: of the function, which
    finds its arguments at another.

    Raises
    ------
    MemoryError
        If a call raised anything, outside of pieces for which others wait: memory is all that jitted loops can lack.
    """
    lower = _entered(typingctx, function, arguments, enter, [])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return lower(context, builder, args[1], [], args[2])

    return types.void(function, arguments, types.int64), codegen


@intrinsic
def share(typingctx: Any, function: Any, rows: Any, arguments: Any, threads: Any) -> Any:
    """Call function(start, stop, *arguments) for equal parts of some rows, one part for each thread; see `together`."""
    lower = _entered(typingctx, function, arguments, _enter_with_rows, [types.int64] * 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return lower(context, builder, args[2], [args[1]], args[3])

    return types.void(function, types.int64, arguments, types.int64), codegen


def threads_if(worth: bool) -> int:
    """Return how many threads are to share a loop: as many as Numba is held to, or one where it is not worth more.

    To ask Numba also loads its threads, as must be done before a function that uses `together` or `share`, even with
    one thread, is read from the cache: Numba does so by itself only for what has a parallel loop of its own.
    """
    threads = int(numba.get_num_threads())
    return threads if worth else 1


def _entered(typingctx: Any, function: Any, arguments: Any, driver: Any, leading: list[Any]) -> Callable[..., Any]:
    """What `together` and `share` have in common: return what writes the code, in LLVM's language.

    record = (*arguments, failed = 0)                   in the frame of the caller, who waits until all have ended
    around(address of record, *leading):                what threads call at its address
        function(*leading, *arguments)                  which may raise: then failed = 1
    driver(address of around, address of record, …)     the parallel loop; with one thread, around itself
    """
    kinds = [types.unliteral(kind) for kind in arguments.types]
    inner = function.get_call_type(typingctx, (*leading, *kinds), {})
    entry = types.Dispatcher(driver)

    def lower(context: Any, builder: Any, given: Any, sizes: list[Any], threads: Any) -> Any:
        numbers = [types.int64] * (3 + len(sizes))
        loop = context.get_function(entry, entry.get_call_type(typingctx, numbers, {}))
        compiled = function.dispatcher.get_compile_result(inner)
        context.add_linking_libs([compiled.library, *loop.libs])
        record = ir.LiteralStructType([*map(context.get_value_type, kinds), _INT64])

        def field(builder: Any, place: Any, i: int) -> Any:
            return cgutils.gep_inbounds(builder, place, 0, i)

        name = builder.module.get_unique_name(f"minimoe.{function.dispatcher.py_func.__name__}")
        around = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_INT64] * (1 + len(leading))), name)
        around.linkage = "internal"
        inside = ir.IRBuilder(around.append_basic_block())
        there = inside.inttoptr(around.args[0], record.as_pointer())
        found = [inside.load(field(inside, there, i)) for i in range(len(kinds))]
        called = context.declare_function(builder.module, compiled.fndesc)
        status, _ = context.call_conv.call_function(
            inside, called, inner.return_type, inner.args, [*around.args[1:], *found]
        )
        with cgutils.if_unlikely(inside, status.is_error):
            inside.store(ir.Constant(_INT64, 1), field(inside, there, len(kinds)))
        inside.ret_void()

        held = cgutils.alloca_once(builder, record)
        for i, (value, have) in enumerate(zip(cgutils.unpack_tuple(builder, given), arguments.types, strict=True)):
            value = context.cast(builder, value, have, kinds[i])
            builder.store(_uncounted(context, builder, kinds[i], value), field(builder, held, i))
        builder.store(ir.Constant(_INT64, 0), field(builder, held, len(kinds)))
        place = builder.ptrtoint(held, _INT64)
        with builder.if_else(builder.icmp_signed("<=", threads, ir.Constant(_INT64, 1))) as (by_one, by_all):
            with by_one:
                builder.call(around, [place, *[ir.Constant(_INT64, 0)] * len(sizes), *sizes])
            with by_all:
                loop(builder, [builder.ptrtoint(around, _INT64), place, *sizes, threads])
        failed = builder.load(field(builder, held, len(kinds)))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, failed)):
            context.call_conv.return_user_exc(builder, MemoryError, ("a thread could not do its part of a loop",))
        return context.get_dummy_value()

    return lower


def _uncounted(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """An array without its count of references, as one has that lies at an address; any other value as it is.

    The caller keeps the array alive. The threads would add to its count and subtract again for each row that they hand
    to another function, in one line of memory: norms of 4,096 rows took two threads twice as long as one.
    """
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo, array.parent = (cgutils.get_null_value(field.type) for field in (array.meminfo, array.parent))
    return array._getvalue()


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
