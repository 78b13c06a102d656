"""Threads that meet between stages: every piece is done once, and in no stage before the one before it is over."""

import numba
import numpy as np
import pytest

from minimoe.loops import dots, jit, part_of, quads
from minimoe.stages import NONE, alone, begin, done, go_on, new_stages, pieces_for


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


@jit(parallel=True)
def _all_follow(threads, stages, pieces, times, early):
    for _ in numba.prange(threads):
        _follow(stages, pieces, times, early)


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


@jit(parallel=True)
def _alone(threads, stages, found):
    for _ in numba.prange(threads):
        for s in range(len(stages)):
            if alone(stages[s]):
                found[s] += s
                done(stages[s])
            elif found[s] != s:
                found[s] = -1


def test_one_thread_does_a_stage_of_one_piece_and_the_others_see_what_it_did():
    found = np.zeros(100_000, np.int64)
    _alone(2, new_stages(len(found)), found)
    np.testing.assert_array_equal(found, np.arange(len(found)))


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


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.uint16])
@pytest.mark.parametrize("rows", [1, 4, 7, 30, 257])
def test_a_row_has_the_same_bits_in_any_piece(rows, dtype):
    rng = np.random.default_rng(rows)
    w = rng.integers(-100, 100, (rows, 75)).astype(dtype)
    x = rng.standard_normal((3, 75)).astype(np.float64 if dtype == np.float64 else np.float32)
    if dtype == np.uint16:
        w = x[:1].repeat(rows, 0).view(np.uint32).__rshift__(16).astype(np.uint16)  # bfloat16 numbers, not NaN
    found = []
    for pieces in (1, 2, 5, 16):
        out = np.zeros((3, rows), x.dtype)
        for piece in range(pieces):
            dots(x, w, 0, *part_of(rows, 0, quads(rows), piece, pieces), out)
        found.append(out)
    assert np.isfinite(found[0]).all()
    assert found[0].any()
    for out in found[1:]:
        np.testing.assert_array_equal(out, found[0])
