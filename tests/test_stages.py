"""Threads that meet between stages: every piece is done once, and in no stage before the one before it is over."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minimoe.few_rows import dots, factors_of, part_of, quads
from minimoe.loops import jit
from minimoe.stages import NONE, alone, begin, done, go_on, new_stages, pieces_for, share, take, threads_if, together

# A loop of one thread, in a fresh process: what it calls is compiled, or read from the cache.
EMBEDDING = """
import sys
import numpy as np
from minimoe.arrays import BFLOAT16
from minimoe.ops.embedding import numba_cpu
dtype = BFLOAT16 if sys.argv[1] == "bfloat16" else sys.argv[1]
x = numba_cpu.forward(np.ones(1, np.int64), np.arange(6).reshape(2, 3).astype(dtype))
assert x.tolist() == [[3, 4, 5]]
"""


@pytest.fixture(autouse=True)
def _threads_are_loaded():
    threads_if(True)


def test_loops_read_from_the_cache_find_numbas_threads(tmp_path):
    # The second process finds the drivers in the cache; what it compiles there refers to threads that it need not load.
    for dtype in ("float32", "bfloat16", "bfloat16", "float32"):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", EMBEDDING, dtype], env=environment, check=True)


@jit()
def _follow(stages, pieces, times, early):
    """In each stage add 1 to a piece of `times`; count what is not yet, or already, as the stage before left it."""
    for s in range(len(stages)):
        piece = begin(stages[s], pieces)
        while piece != NONE:
            for other in range(pieces):
                if times[other] != s and times[other] != s + 1:
                    early[0] += 1
            times[piece] += 1
            piece = go_on(stages[s], pieces)


@jit()
def _all_follow(threads, stages, pieces, times, early):
    together(_follow, (stages, pieces, times, early), threads)


@pytest.mark.parametrize("pieces", [1, 2, 5, 64])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_no_stage_begins_before_the_one_before_it_is_over(threads, pieces):
    stages, times, early = new_stages(20_000), np.zeros(pieces, np.int64), np.zeros(1, np.int64)
    _all_follow(threads, stages, pieces, times, early)
    assert early[0] == 0
    assert (times == len(stages)).all()
    assert (stages[:, 0, 0] == pieces + threads).all()  # taken, and asked for once too often by each thread
    assert (stages[:, 1, 0] == pieces).all()


def test_who_comes_when_all_is_done_finds_nothing_to_do():
    stages, times, early = new_stages(3), np.zeros(4, np.int64), np.zeros(1, np.int64)
    _follow(stages, 4, times, early)
    _follow(stages, 4, times, early)
    assert (times == 3).all()


@jit()
def _alone(stages, found):
    for s in range(len(stages)):
        if alone(stages[s]):
            found[s] += s
            done(stages[s])
        elif found[s] != s:
            found[s] = -1


@jit()
def _all_alone(threads, stages, found):
    together(_alone, (stages, found), threads)


def test_one_thread_does_a_stage_of_one_piece_and_the_others_see_what_it_did():
    found = np.zeros(100_000, np.int64)
    _all_alone(2, new_stages(len(found)), found)
    np.testing.assert_array_equal(found, np.arange(len(found)))


@jit()
def _note(start, stop, factor, negative, offset, source, found, stage, sizes):
    part = take(stage, np.int64(len(sizes)))
    for row in range(start, stop):
        found[row] += (-factor if negative else factor) * source[row] + offset
    sizes[part] = stop - start


@jit()
def _share_notes(rows, threads, source, found, stage, sizes):
    share(_note, rows, (np.float32(2.5), True, 3, source, found, stage, sizes), threads)  # True and 3 are literals


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 5, 1000])
def test_every_row_is_shared_out_once_in_equal_parts_with_what_was_given(rows, threads):
    source, found = np.arange(rows, dtype=np.float64), np.zeros(rows)
    stage, sizes = new_stages(1)[0], np.zeros(16, np.int64)
    _share_notes(rows, threads, source, found, stage, sizes)
    np.testing.assert_array_equal(found, 3 - 2.5 * source)
    assert stage[0, 0] == threads
    assert sizes.sum() == rows
    assert np.ptp(sizes[:threads]) <= 1


@jit()
def _count_calls(stage, fail):
    call = take(stage, np.int64(1000))
    if call == fail:
        raise ValueError("this one fails")


@jit()
def _call_together(threads, stage, fail):
    together(_count_calls, (stage, fail), threads)


@jit()
def _fail_from(start, stop, first):
    for row in range(start, stop):
        if row >= first:
            raise ValueError("this one fails")


@jit()
def _share_failing(rows, threads, first):
    share(_fail_from, rows, (first,), threads)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_thread_calls_once_and_a_call_that_fails_is_told_when_all_are_done(threads):
    for fail in (-1, 0, threads - 1, -1):  # after a failure all is as before
        stage = new_stages(1)[0]
        if fail < 0:
            _call_together(threads, stage, fail)
            _share_failing(10, threads, 10)
        else:
            with pytest.raises(MemoryError, match="a thread could not do its part"):
                _call_together(threads, stage, fail)
            with pytest.raises(MemoryError, match="a thread could not do its part"):
                _share_failing(10, threads, 9)
        assert stage[0, 0] == threads


def test_a_loop_that_is_not_worth_it_has_one_thread():
    assert threads_if(False) == 1
    assert threads_if(True) == numba.get_num_threads()


def test_one_thread_gets_the_work_uncut():
    assert pieces_for(1) == 1
    assert pieces_for(8) >= 8


@pytest.mark.parametrize("seed", range(20))
def test_pieces_share_out_every_row_once(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 50, rng.integers(1, 5)).tolist()
    fours = [quads(n) for n in rows]
    for pieces in (1, 2, 3, 8, 40):
        for weight, n in enumerate(rows):
            end = 0
            for piece in range(pieces):
                first, after = part_of(n, sum(fours[:weight]), sum(fours), piece, pieces)
                if first < after:
                    assert first == end
                    assert first % 4 == 0
                    end = after
            assert end == n


@jit()
def _dots_piece(x, w, piece, pieces, out):
    first, end = part_of(len(w), 0, quads(len(w)), piece, pieces)
    dots(x, factors_of(x, w.dtype, len(x) > 1), w, 0, first, end, out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint16])
@pytest.mark.parametrize("rows", [1, 4, 7, 30, 257])
@pytest.mark.parametrize("width", [75, 96])  # tiles take whole registers
@pytest.mark.parametrize("N", [1, 3])
def test_a_row_has_the_same_bits_in_any_piece(rows, width, N, dtype):
    rng = np.random.default_rng(rows)
    w = rng.integers(-100, 100, (rows, width)).astype(dtype)
    x = rng.standard_normal((N, width)).astype(np.float64 if dtype == np.float64 else np.float32)
    if dtype == np.uint16:
        x = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        w = x[:1].repeat(rows, 0).view(np.uint32).__rshift__(16).astype(np.uint16)  # bfloat16 numbers, not NaN
    found = []
    for pieces in (1, 2, 5, 16):
        out = np.zeros((N, rows), x.dtype)
        for piece in range(pieces):
            _dots_piece(x, w, piece, pieces, out)
        found.append(out)
    assert np.isfinite(found[0]).all()
    assert found[0].any()
    for out in found[1:]:
        np.testing.assert_array_equal(out, found[0])


@intrinsic
def counted(typingctx, x):
    """Whether an array carries a count of its references."""

    def codegen(context, builder, signature, args):
        place = context.make_array(x)(context, builder, args[0]).meminfo
        return builder.zext(cgutils.is_not_null(builder, place), context.get_value_type(types.int64))

    return types.int64(x), codegen


@jit()
def note_counted(start, stop, x, out):
    for i in range(start, stop):
        out[i] = counted(x[i:])


@jit()
def note_in_threads(x, threads, out):
    share(note_counted, len(out), (x, out), threads)
    return counted(x)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_count_references_to_shared_arrays(threads):
    """They would do so for each row, in one line of memory, and be slower together than alone."""
    out = np.full(6, -1)
    assert note_in_threads(np.zeros(6), threads, out) == 1
    assert out.tolist() == [0] * 6
