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

A processor with AVX512-BF16 multiplies bfloat16 without widening them: where the factors are of type PAIR, each holding
two bfloat16 for k and k + 1, one instruction adds both products to a float32 sum, so a line has 32 factors. It takes
numbers below the smallest normal one (1e-38) for zero. Measured on a core that does 116 GFLOP/s with float32: 170.

Source: Van Zee and van de Geijn, BLIS: A Framework for Rapidly Instantiating BLAS Functionality, ACM Transactions on
Mathematical Software 41(3), 2015, section 3 (the micro-kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from minimoe.loops import jit

# What Numba compiles for: the processor it runs on, unless $NUMBA_CPU_FEATURES says otherwise.
_FEATURES = (get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES).split(",")
LINE = 64  # bytes
ROWS = 12 if "+avx512f" in _FEATURES else 6
FEWER = 4  # rows of a smaller tile, for what is left at an edge: with less, multipliers would mostly wait for sums
PAIR = np.dtype(np.uint32)  # two bfloat16, the first in the lower half
MULTIPLIES_PAIRS = "+avx512bf16" in _FEATURES  # whether there may be factors of that type


def _tile(rows: int) -> Any:
    """Make a tile of so many rows, for jitted code.

    Its arguments: the address of `left`, and bytes from row to row and from k to k; that of `right`, and bytes from one
    line to the next; the number of lines; the address of `out`, and bytes from row to row; whether the sums replace
    what is there, or are added to it; the type of the factors, float32, float64 or PAIR.
    """

    @intrinsic
    def tile(typingctx, left, left_row, left_k, right, right_k, K, out, out_row, begin, dtype):
        def codegen(context, builder, signature, args):
            left, left_row, left_k, right, right_k, K, out, out_row, begin, _ = args
            number, align = context.get_value_type(dtype.dtype), dtype.dtype.bitwidth // 8
            line = ir.VectorType(number, LINE // align)
            sums, multiply_add = _multiply_add(builder, line)
            undefined, first = ir.Constant(line, ir.Undefined), ir.Constant(ir.IntType(32), 0)
            everywhere = ir.Constant(ir.VectorType(ir.IntType(32), line.count), None)  # lane 0, for each lane

            total = [cgutils.alloca_once_value(builder, ir.Constant(sums, None)) for _ in range(rows)]  # registers
            x, y = cgutils.alloca_once_value(builder, left), cgutils.alloca_once_value(builder, right)
            with cgutils.for_range(builder, K):
                here, there = builder.load(x), builder.load(y)
                vector = builder.load(_pointer(builder, there, 0, right_k, line), align=align)
                for row in range(rows):
                    one = builder.load(_pointer(builder, here, row, left_row, number), align=align)
                    same = builder.shuffle_vector(builder.insert_element(undefined, one, first), undefined, everywhere)
                    builder.store(multiply_add(same, vector, builder.load(total[row])), total[row])
                builder.store(builder.add(here, left_k), x)
                builder.store(builder.add(there, right_k), y)
            places = [_pointer(builder, out, row, out_row, sums) for row in range(rows)]
            with builder.if_else(cgutils.as_bool_bit(builder, begin)) as (replace, add):
                with replace:
                    for place, found in zip(places, total, strict=True):
                        builder.store(builder.load(found), place, align=align)
                with add:
                    for place, found in zip(places, total, strict=True):
                        value = builder.fadd(builder.load(place, align=align), builder.load(found))
                        builder.store(value, place, align=align)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, types.boolean, dtype), codegen

    return tile


def _pointer(builder: Any, base: Any, row: int, step: Any, kind: Any) -> Any:
    """Point to what lies so many steps after `base`."""
    return builder.inttoptr(builder.add(base, builder.mul(step, ir.Constant(step.type, row))), kind.as_pointer())


def _multiply_add(builder: Any, line: Any) -> tuple[Any, Callable[[Any, Any, Any], Any]]:
    """Return the type of a line of sums, and what adds the product of two lines of factors to it."""
    if line.element == ir.IntType(32):
        sums = ir.VectorType(ir.FloatType(), line.count)
        narrow = ir.VectorType(_Bfloat16(), 2 * line.count) if binding.llvm_version_info[0] > 15 else line
        kind, name = ir.FunctionType(sums, [sums, narrow, narrow]), "llvm.x86.avx512bf16.dpbf16ps.512"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        return sums, lambda x, y, total: builder.call(
            function, [total, builder.bitcast(x, narrow), builder.bitcast(y, narrow)]
        )
    name = f"llvm.fmuladd.v{line.count}f{8 * LINE // line.count}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(line, [line] * 3), name)
    return line, lambda x, y, total: builder.call(function, [x, y, total])


class _Bfloat16(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat16)

    def __hash__(self) -> int:
        return hash(_Bfloat16)


_large, _small, _single = _tile(ROWS), _tile(FEWER), _tile(1)


@jit()
def multiply(left, right, out, begin):
    """out = left · right if `begin`, else it is added to `out`.

    left (M, K) of any strides; right (K, N) and out (M, N) with columns side by side, N being whole lines; all of one
    type, float32 or float64, or the factors of type PAIR and out float32. Every sum is taken in ascending order of k,
    whatever M and N are.
    """
    multiply_ahead(left, right, out, begin, np.int64(0), np.int64(0), np.int64(0))


@jit()
def multiply_ahead(left, right, out, begin, ahead, ahead_row, lines):
    """`multiply`, and with each large tile ask for `lines` of memory: those at `ahead`, then `ahead_row` bytes on.

    What is read next arrives while this is multiplied; a processor foresees by itself only what lies one after another.
    """
    x, x_row, x_k = left.ctypes.data, left.strides[0], left.strides[1]
    y, y_k, z, z_row = right.ctypes.data, right.strides[0], out.ctypes.data, out.strides[0]
    (M, K), begin = left.shape, bool(begin)
    for n in range(0, right.shape[1] * right.itemsize, LINE):
        multiply_line(x, x_row, x_k, M, y + n, y_k, K, z + n, z_row, begin, right.dtype, ahead, ahead_row, lines)
        ahead += M // ROWS * ahead_row


@jit()
def multiply_line(x, x_row, x_k, M, y, y_k, K, z, z_row, begin, dtype, ahead, ahead_row, lines):
    """`multiply_ahead` with one line of columns, of what lies at addresses: compiled once for a type of factors.

    The arguments are those of a tile, and the number M of rows.
    """
    m = 0
    while m + ROWS <= M:
        for i in range(lines):
            _ask_for(ahead + i * LINE)
        ahead += ahead_row
        _large(x + m * x_row, x_row, x_k, y, y_k, K, z + m * z_row, z_row, begin, dtype)
        m += ROWS
    while m + FEWER <= M:
        _small(x + m * x_row, x_row, x_k, y, y_k, K, z + m * z_row, z_row, begin, dtype)
        m += FEWER
    while m < M:
        _single(x + m * x_row, x_row, x_k, y, y_k, K, z + m * z_row, z_row, begin, dtype)
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


@jit()
def turn(source, target):
    """target[j, i] = source[i, j], squares of whole lines at once; of one type, numbers of a row side by side."""
    (M, N), lanes = source.shape, LINE // source.itemsize
    rows, columns = M - M % lanes, N - N % lanes
    place, row, out, out_row = source.ctypes.data, source.strides[0], target.ctypes.data, target.strides[0]
    for i in range(0, rows, lanes):
        for j in range(0, columns, lanes):
            here, there = place + i * row + j * source.itemsize, out + j * out_row + i * source.itemsize
            _turn_square(here, row, there, out_row, source.dtype)
    for i in range(M):
        for j in range(columns if i < rows else 0, N):
            target[j, i] = source[i, j]


@intrinsic
def _turn_square(typingctx, source, source_row, target, target_row, dtype):
    """Turn a square that is a line wide, in registers: a round for each bit that numbers rows and columns.

    In each the two bits are exchanged: what lies in row …0… and column …1… goes to row …1… and column …0….
    """

    def codegen(context, builder, signature, args):
        source, source_row, target, target_row, _ = args
        align = dtype.dtype.bitwidth // 8
        line = ir.VectorType(context.get_value_type(dtype.dtype), LINE // align)
        lanes, bit = range(line.count), 1
        rows = [builder.load(_pointer(builder, source, i, source_row, line), align=align) for i in lanes]

        def pick(a, b, lanes_of_both):
            numbers = ir.VectorType(ir.IntType(32), line.count)
            return builder.shuffle_vector(a, b, ir.Constant(numbers, lanes_of_both))

        while bit < line.count:
            for i in lanes:
                if not i & bit:
                    a, b = rows[i], rows[i | bit]
                    rows[i] = pick(a, b, [line.count + (j ^ bit) if j & bit else j for j in lanes])
                    rows[i | bit] = pick(a, b, [line.count + j if j & bit else j | bit for j in lanes])
            bit *= 2
        for i in lanes:
            builder.store(rows[i], _pointer(builder, target, i, target_row, line), align=align)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, dtype), codegen
