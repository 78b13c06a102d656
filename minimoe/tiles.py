"""The innermost step of matrix products on the CPU: a tile of sums that stays in the processor's registers.

    out[row, lane] = Σ_k left[row, k] · right[k, lane]        row < ROWS, lane < LANES

For every k a tile reads one line of `right`, LANES numbers side by side (16 float32, or 8 float64), and one number of
each row of `left`, which it multiplies with the whole line: ROWS + LANES numbers for ROWS · LANES products. Nothing is
written before the last k, where a loop over arrays would read and write its sums each time; Numba cannot be told to
keep an array in registers, so this one loop is given to LLVM in its own language, with a variable for each row. In a
core's own cache it was measured at 86 to 91 of the 94 GFLOP/s that the core can do at most, float32 with AVX2, down to
32 products for a sum.

A line is one cache line, 64 bytes: one register of AVX-512, two of AVX2, four of NEON. AVX2 has 16 registers, the other
two 32, and the sums of 6 lines or, in AVX-512, 12 keep both of its multipliers busy while an addition takes 4 cycles.

Source: Van Zee and van de Geijn, BLIS: A Framework for Rapidly Instantiating BLAS Functionality, ACM Transactions on
Mathematical Software 41(3), 2015, section 3 (the micro-kernel).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimoe.loops import jit

LINE = 64  # bytes
ROWS = 12 if binding.get_host_cpu_features().get("avx512f") else 6
FEWER = ROWS // 3  # rows of a smaller tile, for what is left at an edge


def _tile(rows: int) -> Any:
    """Make a tile of so many rows, for jitted code.

    Its arguments: the address of `left`, and bytes from row to row and from k to k; that of `right`, and bytes from one
    line to the next; the number of lines; the address of `out`, and bytes from row to row; whether the sums replace
    what is there, or are added to it; the type, float32 or float64.
    """

    @intrinsic
    def tile(typingctx, left, left_row, left_k, right, right_k, K, out, out_row, begin, dtype):
        def codegen(context, builder, signature, args):
            left, left_row, left_k, right, right_k, K, out, out_row, begin, _ = args
            number, align = context.get_value_type(dtype.dtype), dtype.dtype.bitwidth // 8
            lanes = LINE // align
            line = ir.VectorType(number, lanes)
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(line, [line] * 3), f"llvm.fmuladd.v{lanes}f{dtype.dtype.bitwidth}"
            )
            undefined, first = ir.Constant(line, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)  # lane 0, for each lane

            def pointer(base, row, step, kind):
                place = builder.add(base, builder.mul(step, ir.Constant(step.type, row)))
                return builder.inttoptr(place, kind.as_pointer())

            total = [cgutils.alloca_once_value(builder, ir.Constant(line, None)) for _ in range(rows)]  # registers
            x, y = cgutils.alloca_once_value(builder, left), cgutils.alloca_once_value(builder, right)
            with cgutils.for_range(builder, K):
                here, there = builder.load(x), builder.load(y)
                vector = builder.load(pointer(there, 0, right_k, line), align=align)
                for row in range(rows):
                    one = builder.load(pointer(here, row, left_row, number), align=align)
                    same = builder.shuffle_vector(builder.insert_element(undefined, one, first), undefined, everywhere)
                    builder.store(builder.call(multiply_add, [same, vector, builder.load(total[row])]), total[row])
                builder.store(builder.add(here, left_k), x)
                builder.store(builder.add(there, right_k), y)
            places = [pointer(out, row, out_row, line) for row in range(rows)]
            with builder.if_else(cgutils.as_bool_bit(builder, begin)) as (replace, add):
                with replace:
                    for place, sums in zip(places, total, strict=True):
                        builder.store(builder.load(sums), place, align=align)
                with add:
                    for place, sums in zip(places, total, strict=True):
                        value = builder.fadd(builder.load(place, align=align), builder.load(sums))
                        builder.store(value, place, align=align)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, types.boolean, dtype), codegen

    return tile


_large, _small, _single = _tile(ROWS), _tile(FEWER), _tile(1)


@jit()
def multiply(left, right, out, begin):
    """out = left · right if `begin`, else it is added to `out`.

    left (M, K) of any strides; right (K, N) and out (M, N) with columns side by side, N being whole lines; all of one
    type, float32 or float64. Every sum is taken in ascending order of k, whatever M and N are.
    """
    multiply_ahead(left, right, out, begin, np.int64(0), np.int64(0), np.int64(0))


@jit()
def multiply_ahead(left, right, out, begin, ahead, ahead_row, lines):
    """`multiply`, and with each large tile ask for `lines` of memory: those at `ahead`, then `ahead_row` bytes on.

    What is read next arrives while this is multiplied; a processor foresees by itself only what lies one after another.
    """
    x, x_row, x_k = left.ctypes.data, left.strides[0], left.strides[1]
    y, y_k, z, z_row = right.ctypes.data, right.strides[0], out.ctypes.data, out.strides[0]
    (M, K), width, begin = left.shape, right.shape[1] * right.itemsize, bool(begin)
    _all_tiles(x, x_row, x_k, M, y, y_k, K, z, z_row, width, begin, out.dtype, ahead, ahead_row, lines)


@jit()
def _all_tiles(x, x_row, x_k, M, y, y_k, K, z, z_row, width, begin, dtype, ahead, ahead_row, lines):
    """Knows addresses and strides only: compiled once for a type, and not for each kind of array."""
    for n in range(0, width, LINE):
        m = 0
        while m + ROWS <= M:
            for i in range(lines):
                _ask_for(ahead + i * LINE)
            ahead += ahead_row
            _large(x + m * x_row, x_row, x_k, y + n, y_k, K, z + m * z_row + n, z_row, begin, dtype)
            m += ROWS
        while m + FEWER <= M:
            _small(x + m * x_row, x_row, x_k, y + n, y_k, K, z + m * z_row + n, z_row, begin, dtype)
            m += FEWER
        while m < M:
            _single(x + m * x_row, x_row, x_k, y + n, y_k, K, z + m * z_row + n, z_row, begin, dtype)
            m += 1


@intrinsic
def _ask_for(typingctx, place):
    """Let a line of memory be brought into the core's second cache while other things are done."""

    def codegen(context, builder, signature, args):
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch")
        read, second, data = (ir.Constant(number, value) for value in (0, 2, 1))
        builder.call(prefetch, [builder.inttoptr(args[0], pointer), read, second, data])
        return context.get_dummy_value()

    return types.void(types.intp), codegen
