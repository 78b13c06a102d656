"""The innermost step of matrix products on the CPU: a tile of sums that stays in the processor's registers.

    out[row, lane] = Σ_k left[row, k] · right[k, lane]        row < ROWS, lane < LANES

For every k a tile reads one line of `right`, LANES numbers side by side (16 float32, or 8 float64), and one number of
each row of `left`, which it multiplies with the whole line: ROWS + LANES numbers for ROWS · LANES products. Nothing is
written before the last k, where a loop over arrays would read and write its sums each time; Numba cannot be told to
keep an array in registers, so this one loop is given to LLVM in its own language, with a variable for each row. In a
core's own cache it was measured at 86 to 91 of the 94 GFLOP/s that the core can do at most, float32 with AVX2, down to
32 products for a sum.

A line is one cache line, 64 bytes: one register of AVX-512, two of AVX2, four of NEON. AVX2 has 16 registers, the other
two 32, and the sums of 6 lines keep both of its multipliers busy while an addition takes 4 cycles. With AVX-512 a tile
of 12 rows is two lines wide, where there are two: a number of a row is read once for both.

A processor with AVX512-BF16 multiplies bfloat16 without widening them: where the factors are of type PAIR, each holding
two bfloat16 for k and k + 1, one instruction adds both products to a float32 sum, so a line has 32 factors. It takes
numbers below the smallest normal one (1e-38) for zero. Measured on a core that does 117 GFLOP/s with float32: 234, and
175 in tiles of one line.

Where `left` has few rows, `right` is used only once: it is not copied to lie well, but read where it is (`stream`,
`stream_turned`). What is used AHEAD rows later is asked for meanwhile, as a processor foresees by itself only what lies
one after another: without, attention to 16,384 keys took twice as long.

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

from minimoe.loops import holds_bfloat16, holds_pairs, jit

# What Numba compiles for: the processor it runs on, unless $NUMBA_CPU_FEATURES says otherwise.
_FEATURES = (get_host_cpu_features() if numba.config.CPU_FEATURES is None else numba.config.CPU_FEATURES).split(",")
LINE = 64  # bytes
ROWS, LINES = (12, 2) if "+avx512f" in _FEATURES else (6, 1)  # of a large tile
FEWER = 4  # rows of a smaller tile, for what is left at an edge: with less, multipliers would mostly wait for sums
REGISTER = LINE if "+avx512f" in _FEATURES else LINE // 2  # bytes
WIDE = 2 if "+avx512f" in _FEATURES else 1  # lines of a tile of FEWER rows: 8 registers of sums
WIDE_SINGLE = 4  # lines of a tile of one row
AHEAD = 16  # rows: no fewer than are read of one head before the next head's turn; up to 64 were as fast
FAR = 1 << 17  # bytes: rather half as many rows ahead than more, as what is asked for must stay in a cache till then
PAIR = np.dtype(np.uint32)  # two bfloat16, the first in the lower half
MULTIPLIES_PAIRS = "+avx512bf16" in _FEATURES  # whether there may be factors of that type


def _tile(rows: int, lines: int = 1, streams: bool = False) -> Any:
    """Make a tile of so many rows, and so many lines side by side, for jitted code.

    Its arguments: the address of `left`, and bytes from row to row and from k to k; that of `right`, and bytes from k
    to k and from line to line; the number of k's; the address of `out`, and bytes from row to row and from line to
    line; whether the sums replace what is there, or are added to it; the type of the factors, float32, float64 or PAIR.

    If it `streams`, what lies AHEAD rows on in `right` is asked for, and `right` may be bfloat16 as it is stored. The
    type is uint16 where `left` is float32: a line is widened as it is read. It is PAIR where `left` has pairs for two
    rows of `right`: they are read as one k, `right_k` still being the bytes of one, and their lines, 32 numbers each,
    make two lines of pairs, so there are two lines at least.
    """

    @intrinsic
    def tile(typingctx, left, left_row, left_k, right, right_k, right_line, K, out, out_row, out_line, begin, dtype):
        def codegen(context, builder, signature, args):
            left, left_row, left_k, right, right_k, right_line, K, out, out_row, out_line, begin, _ = args
            line, stored = _line(context, dtype.dtype, LINE)
            align = _size(line)
            sums, multiply_add = _multiply_add(builder, line)
            columns, step = (max(2, lines), 2) if streams and sums != line else (lines, 1)

            def read(base, row, column):
                place = _place(builder, base, column, right_line)
                if streams:
                    _ask(builder, _pointer(builder, place, row + AHEAD, right_k, stored))
                return _read(builder, _pointer(builder, place, row, right_k, stored), stored, line)

            places = [(row, column) for row in range(rows) for column in range(columns)]
            total = {
                place: cgutils.alloca_once_value(builder, ir.Constant(sums, None)) for place in places
            }  # registers
            x, y = cgutils.alloca_once_value(builder, left), cgutils.alloca_once_value(builder, right)
            with cgutils.for_range(builder, K):
                here, there = builder.load(x), builder.load(y)
                found = [[read(there, row, i) for row in range(step)] for i in range(columns // step)]
                vectors = [v for both in found for v in (_interleaved(builder, *both) if step == 2 else both)]
                for row in range(rows):
                    one = builder.load(_pointer(builder, here, row, left_row, line.element), align=align)
                    same = _everywhere(builder, one, line)
                    for column, vector in enumerate(vectors):
                        one_sum = total[row, column]
                        builder.store(multiply_add(same, vector, builder.load(one_sum)), one_sum)
                builder.store(builder.add(here, left_k), x)
                builder.store(_place(builder, there, step, right_k), y)
            targets = {
                (row, column): _pointer(builder, _place(builder, out, column, out_line), row, out_row, sums)
                for row, column in places
            }
            with builder.if_else(cgutils.as_bool_bit(builder, begin)) as (replace, add):
                with replace:
                    for place, target in targets.items():
                        builder.store(builder.load(total[place]), target, align=align)
                with add:
                    for place, target in targets.items():
                        value = builder.fadd(builder.load(target, align=align), builder.load(total[place]))
                        builder.store(value, target, align=align)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10, types.boolean, dtype), codegen

    return tile


def _dots(rows: int) -> Any:
    """Make a tile where rows of `right` are columns: out[row, column] = Σ_k left[row, k] · right[column, k].

    Its arguments: the address of `left`, and bytes from row to row; the same of `right`; the number of registers that a
    row fills; the address of `out`, and bytes from row to row; how many bytes further on to ask for what comes next;
    the type of `right`, as of a tile that streams, or int8, which becomes float32 as it is read.

    Each row and column has a sum in every lane of a register. The lanes are added up for all of them together, in
    rounds of `_halved`: half as many registers are left after each, and at last one, with a sum in each lane.
    """

    @intrinsic
    def dots(typingctx, left, left_row, right, right_row, K, out, out_row, ahead, dtype):
        def codegen(context, builder, signature, args):
            left, left_row, right, right_row, K, out, out_row, ahead, _ = args
            line, stored = _line(context, dtype.dtype, REGISTER)
            align = _size(line)
            sums, multiply_add = _multiply_add(builder, line)
            columns = FEWER if rows == 1 else line.count // FEWER  # of four rows, as many sums as lanes
            total = [cgutils.alloca_once_value(builder, ir.Constant(sums, None)) for _ in range(rows * columns)]
            x, y = cgutils.alloca_once_value(builder, left), cgutils.alloca_once_value(builder, right)
            with cgutils.for_range(builder, K):
                here, there = builder.load(x), builder.load(y)
                lefts = [builder.load(_pointer(builder, here, row, left_row, line), align=align) for row in range(rows)]
                for column in range(columns):
                    _ask(builder, _pointer(builder, builder.add(there, ahead), column, right_row, stored))
                    vector = _read(builder, _pointer(builder, there, column, right_row, stored), stored, line)
                    for row in range(rows):
                        one_sum = total[row * columns + column]
                        builder.store(multiply_add(lefts[row], vector, builder.load(one_sum)), one_sum)
                builder.store(builder.add(here, ir.Constant(left.type, REGISTER)), x)
                builder.store(builder.add(there, ir.Constant(left.type, line.count * _size(stored))), y)
            parts, bit = [builder.load(one_sum) for one_sum in total], 1
            while bit < len(total):
                for i in range(0, len(total), 2 * bit):
                    parts[i] = _halved(builder, parts[i], parts[i | bit], bit)
                bit *= 2
            found = parts[0]
            while found.type.count > len(total):
                half = found.type.count // 2
                found = builder.fadd(*(_lanes(builder, found, start, half) for start in (0, half)))
            for row in range(rows):
                part = _lanes(builder, found, row * columns, columns)
                builder.store(part, _pointer(builder, out, row, out_row, part.type), align=align)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, dtype), codegen

    return dots


def _line(context: Any, kind: Any, size: int) -> tuple[Any, Any]:
    """So many bytes of factors, and the same numbers as they are stored: fewer bytes of uint16 or int8, for float32."""
    number = context.get_value_type(kind)
    if kind in (types.uint16, types.int8):
        return ir.VectorType(ir.FloatType(), size // 4), ir.VectorType(number, size // 4)
    line = ir.VectorType(number, 8 * size // kind.bitwidth)
    return line, line


def _size(line: Any) -> int:
    """The bytes of a number in a line."""
    sizes = {ir.IntType(8): 1, ir.IntType(16): 2, ir.IntType(32): 4, ir.FloatType(): 4, ir.DoubleType(): 8}
    return sizes[line.element]


def _read(builder: Any, pointer: Any, stored: Any, line: Any) -> Any:
    """Load a line of factors, widened if it is stored in bfloat16 or int8."""
    found = builder.load(pointer, align=_size(stored))
    if stored == line:
        return found
    bits = ir.VectorType(ir.IntType(32), line.count)
    if stored.element == ir.IntType(8):
        return builder.sitofp(builder.sext(found, bits), line)
    return builder.bitcast(builder.shl(builder.zext(found, bits), ir.Constant(bits, [16] * line.count)), line)


def _place(builder: Any, base: Any, row: int, step: Any) -> Any:
    """Where a row begins: so many steps after `base`."""
    return builder.add(base, builder.mul(step, ir.Constant(step.type, row)))


def _pointer(builder: Any, base: Any, row: int, step: Any, kind: Any) -> Any:
    """Point to what lies where a row begins."""
    return builder.inttoptr(_place(builder, base, row, step), kind.as_pointer())


def _everywhere(builder: Any, number: Any, line: Any) -> Any:
    """A line with the same number in each lane."""
    first, lanes = ir.Constant(ir.IntType(32), 0), ir.VectorType(ir.IntType(32), line.count)
    undefined = ir.Constant(line, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, number, first), undefined, ir.Constant(lanes, None))


def _picked(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """These lanes of two vectors, those of `b` counted on from those of `a`."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _lanes(builder: Any, vector: Any, start: int, number: int) -> Any:
    """Some lanes that are neighbours."""
    return _picked(builder, vector, vector, list(range(start, start + number)))


def _exchanged(builder: Any, a: Any, b: Any, bit: int) -> tuple[Any, Any]:
    """Two lines whose numbers differ in a bit, after it was exchanged with the same bit of lanes: see `_turn_square`.

    For bit 1: a0 a1 a2 a3 and b0 b1 b2 b3 become a0 b0 a2 b2 and a1 b1 a3 b3.
    """
    count, lanes = a.type.count, range(a.type.count)
    first = [count + (j ^ bit) if j & bit else j for j in lanes]
    second = [count + j if j & bit else j | bit for j in lanes]
    return _picked(builder, a, b, first), _picked(builder, a, b, second)


def _halved(builder: Any, a: Any, b: Any, bit: int) -> Any:
    """Add up pairs of lanes that differ in a bit: for bit 1, a0 + a1, b0 + b1, a2 + a3, b2 + b3.

    Of the two lines that are added one takes every lane from where it is, which costs a processor least.
    """
    count, lanes = a.type.count, range(a.type.count)
    here = [count + j if j & bit else j for j in lanes]
    there = [i ^ bit for i in here]
    return builder.fadd(_picked(builder, a, b, here), _picked(builder, a, b, there))


def _interleaved(builder: Any, a: Any, b: Any) -> list[Any]:
    """Two lines of bfloat16 as two lines of PAIR, each of a number of `a` and one of `b`."""
    line, count = a.type, 2 * a.type.count
    a, b = (builder.bitcast(x, ir.VectorType(ir.IntType(16), count)) for x in (a, b))
    lanes = [i // 2 + i % 2 * count for i in range(2 * count)]
    return [builder.bitcast(_picked(builder, a, b, part), line) for part in (lanes[:count], lanes[count:])]


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
    name = f"llvm.fmuladd.v{line.count}{'f64' if line.element == ir.DoubleType() else 'f32'}"
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


_large, _small, _single = _tile(ROWS, LINES), _tile(FEWER, LINES), _tile(1, LINES)
_large_line, _small_line, _single_line = _tile(ROWS), _tile(FEWER), _tile(1)
_wide, _slim, _wide_single, _slim_single = (
    _tile(rows, lines, True) for rows, lines in ((FEWER, WIDE), (FEWER, 1), (1, WIDE_SINGLE), (1, 1))
)
_dots_few, _dots_two, _dots_single = _dots(FEWER), _dots(2), _dots(1)


@jit()
def multiply(left, right, out, begin):
    """out = left · right if `begin`, else it is added to `out`.

    left (M, K) of any strides; right (K, N) and out (M, N) with columns side by side, N being whole lines; all of one
    type, float32 or float64, or the factors of type PAIR and out float32. Every sum is taken in ascending order of k,
    whatever M and N are.
    """
    line, width = np.int64(LINE), right.shape[1] * right.itemsize
    (M, K), begin = left.shape, bool(begin)
    for n in range(0, width, LINES * LINE):
        lines = min(np.int64(LINES), (width - n) // LINE)
        multiply_lines(
            left.ctypes.data, left.strides[0], left.strides[1], M, right.ctypes.data + n, right.strides[0], line, K,
            out.ctypes.data + n, out.strides[0], line, lines, begin, right.dtype, np.int64(0), np.int64(0), np.int64(0),
        )  # fmt: skip


@jit()
def multiply_lines(x, x_row, x_k, M, y, y_k, y_line, K, z, z_row, z_line, lines, begin, dtype, ahead, ahead_row, asked):
    """`multiply` with up to LINES lines of columns, of what lies at addresses: compiled once for a type of factors.

    The arguments are those of a tile, and the numbers of rows, M, and of lines. With each large tile it asks for as
    many rows of memory as there are lines, `asked` bytes of each, from `ahead` on, `ahead_row` bytes apart. What is
    read next arrives while this is multiplied; a processor foresees by itself only what lies one after another.
    """
    whole, m = lines == LINES, 0
    while m + ROWS <= M:
        for _ in range(lines):
            for i in range(0, asked, LINE):
                _ask_for(ahead + i)
            ahead += ahead_row
        here, place = x + m * x_row, z + m * z_row
        if whole:
            _large(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        else:
            _large_line(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        m += ROWS
    while m + FEWER <= M:
        here, place = x + m * x_row, z + m * z_row
        if whole:
            _small(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        else:
            _small_line(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        m += FEWER
    while m < M:
        here, place = x + m * x_row, z + m * z_row
        if whole:
            _single(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        else:
            _single_line(here, x_row, x_k, y, y_k, y_line, K, place, z_row, z_line, begin, dtype)
        m += 1


@jit()
def stream(left, right, out, begin):
    """out[h] = left[h] · right[:, h] if `begin`, else it is added to `out`, for every h.

    `right` is read from memory once. left (H, M, K), M being 1 or whole FEWERs; right (K, H, N), its numbers side by
    side; out (H, M, N), columns side by side, N being whole lines. Besides those of `multiply` there is bfloat16 as it
    is stored: right of uint16 and left float32, or both of PAIR, right (K, H, N / 2) with pairs of neighbours in a row,
    left (H, M, K / 2) with pairs of neighbours in k, K being even and N an even number of lines.
    """
    x, x_head, x_row, x_k = left.ctypes.data, left.strides[0], left.strides[1], left.strides[2]
    y, y_k, y_head = right.ctypes.data, right.strides[0], right.strides[1]
    z, z_head, z_row = out.ctypes.data, out.strides[0], out.strides[1]
    (H, M, K), width, begin = left.shape, out.shape[2] * out.itemsize, bool(begin)
    ratio = 2 if holds_pairs(right) or holds_bfloat16(right) else 1  # bytes of out for each byte of right
    line, y_line = np.int64(LINE), np.int64(LINE // 2 if holds_bfloat16(right) else LINE)
    least, most = LINE * (2 if holds_pairs(right) else 1), LINE * (WIDE if M > 1 else WIDE_SINGLE)
    for h in range(H):
        for m in range(0, M, FEWER):
            here, place, n = x + h * x_head + m * x_row, z + h * z_head + m * z_row, 0
            while n < width:
                there, wide = y + h * y_head + n // ratio, n + most <= width
                if wide and M > 1:
                    _wide(here, x_row, x_k, there, y_k, y_line, K, place + n, z_row, line, begin, right.dtype)
                elif wide:
                    _wide_single(here, x_row, x_k, there, y_k, y_line, K, place + n, z_row, line, begin, right.dtype)
                elif M > 1:
                    _slim(here, x_row, x_k, there, y_k, y_line, K, place + n, z_row, line, begin, right.dtype)
                else:
                    _slim_single(here, x_row, x_k, there, y_k, y_line, K, place + n, z_row, line, begin, right.dtype)
                n += most if wide else least


@jit()
def stream_turned(left, right, out):
    """out[h] = left[h] · right[:, h]ᵀ for every h. `right` is read from memory once.

    left (H, M, K) and right (N, H, K), N being whole FEWERs, with numbers of a row side by side and in whole registers;
    out (H, M, N). Types as of `stream`, where pairs of left too are of neighbours in a row; and right of int8 with left
    of float32. A sum has the same bits wherever it stands, beside any other sums, but not where M is 1.
    """
    x, x_head, x_row = left.ctypes.data, left.strides[0], left.strides[1]
    y, y_row, y_head = right.ctypes.data, right.strides[0], right.strides[1]
    z, z_head, z_row, size = out.ctypes.data, out.strides[0], out.strides[1], left.itemsize
    (H, M, _), registers = left.shape, left.shape[2] * size // REGISTER
    ahead = y_row * max(AHEAD // 2, min(AHEAD, FAR // max(y_row, 1)))
    columns = FEWER if M == 1 else REGISTER // size // FEWER
    height = FEWER if M >= FEWER else 2 if M > 1 else 1
    for n in range(0, right.shape[0], columns):
        for h in range(H):
            there = y + n * y_row + h * y_head
            for m in range(0, M, height):
                row = min(m, M - height)  # the last tile may do some rows again
                here, place = x + h * x_head + row * x_row, z + h * z_head + row * z_row + n * size
                if height == FEWER:
                    _dots_few(here, x_row, there, y_row, registers, place, z_row, ahead, right.dtype)
                elif height == 2:
                    _dots_two(here, x_row, there, y_row, registers, place, z_row, ahead, right.dtype)
                else:
                    _dots_single(here, x_row, there, y_row, registers, place, z_row, ahead, right.dtype)


@intrinsic
def _ask_for(typingctx, place):
    """Let a line of memory be brought into the core's second cache while other things are done."""

    def codegen(context, builder, signature, args):
        _ask(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def _ask(builder: Any, pointer: Any) -> None:
    """`_ask_for`, in LLVM's language."""
    number, byte = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
    prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch")
    read, second, data = (ir.Constant(number, value) for value in (0, 2, 1))
    builder.call(prefetch, [builder.bitcast(pointer, byte), read, second, data])


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

        while bit < line.count:
            for i in lanes:
                if not i & bit:
                    rows[i], rows[i | bit] = _exchanged(builder, rows[i], rows[i | bit], bit)
            bit *= 2
        for i in lanes:
            builder.store(rows[i], _pointer(builder, target, i, target_row, line), align=align)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, dtype), codegen
