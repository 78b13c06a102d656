"""How far from the truth a correct implementation may be, for every tensor and numeric profile: derived, not guessed.

The reference is run `SAMPLES` times on disturbed arithmetic (see `noise`), its routing held to the golden choices. For
each output the largest errors e of the runs, max |noisy - truth|, have a mean and a standard deviation, and

    bound = SAFETY · (mean(e) + SPREADS · deviation(e))

kept as a number relative to max |truth|. Uniform noise is already worse than rounding: its root mean square is u/√3,
that of rounding to the nearest about u/2.4. The mean and three deviations are what hardly a run exceeds; the factor 2
is for what the noise does not have: errors that depend on each other, and other formulas for the same function.

A bound is at least FLOOR unit roundoffs of the type the output is stored in, since storing it rounds. In float16, which
underflows, it has an absolute term of at least one smallest number. Where the truth is all zero, or smaller than any
normal number of float16, the bound is all absolute. Exact outputs (ids, positions, gathered integers) have no bound.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from minimoe.backends import make_backend
from minimoe.golden.calls import CALLS, GoldenModel, run
from minimoe.golden.perturbing import magnified, noting, perturbed, replaying
from minimoe.golden.profiles import PROFILES, Profile
from minimoe.params import Params, map_leaves, named, stack_experts
from minimoe.shapes import Array

SAMPLES, SAFETY, SPREADS, FLOOR = 32, 2.0, 3.0, 2.0
SMALL = 1 << 24  # parameters up to which a model is widened to float64 as a whole

HOW = (
    f"Monte Carlo arithmetic: {SAMPLES} runs of the reference in which every product and every partial sum is off by "
    "an independent random relative error of up to one unit roundoff, with the golden routing imposed; bound = "
    f"{SAFETY:g} * (mean + {SPREADS:g} standard deviations) of the largest error per tensor, at least {FLOOR:g} unit "
    "roundoffs of the output's type"
)


def make(
    call: str,
    inputs: Mapping[str, Array],
    settings: Mapping[str, Any],
    model: GoldenModel | None,
    truth: Mapping[str, Array],
    profile: str,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return the bound of each floating output of a call: |error| <= relative · max|truth| + absolute.

    Parameters
    ----------
    inputs, model : as the case stores them, in any floating type
    truth : the outputs in float64
    samples : runs; a large model of one's own may do with 6
    """
    floats = [name for name, x in truth.items() if np.asarray(x).dtype.kind == "f"]
    if not floats:
        return {}
    errors: dict[str, list[float]] = {name: [] for name in floats}
    unit = magnified(PROFILES[profile])
    for found in disturbed_runs(call, inputs, settings, model, profile, samples, seed):
        for name in floats:
            errors[name].append(largest_error(found[name], truth[name]) / unit)
    return {name: bound(np.array(errors[name]), truth[name], PROFILES[profile], name) for name in floats}


def disturbed_runs(
    call: str,
    inputs: Mapping[str, Array],
    settings: Mapping[str, Any],
    model: GoldenModel | None,
    profile: str,
    samples: int,
    seed: int,
) -> Iterator[dict[str, Array]]:
    """Yield the outputs of run after run, each with rounding errors of its own and the routing of the exact one."""
    ops = make_backend("numpy")
    inputs = {name: _widened(x) for name, x in inputs.items()}
    if model is not None:
        model = GoldenModel(model.config, stack_experts(_wide_enough(model.params)))  # once, not in every run
    choices: list[Array] = []
    if routes(call):
        run(call, noting(ops, choices), inputs, settings, model)
    noisy = perturbed(ops, PROFILES[profile], [seed, zlib.crc32(f"{call}/{profile}".encode())])
    for _ in range(samples):
        yield run(call, replaying(noisy, iter(choices)), inputs, settings, model)


def routes(call: str) -> bool:
    """Whether a call asks the gate."""
    return call.startswith("gating") or CALLS[call].level != "op"


def largest_error(found: Array, truth: Array) -> float:
    """The largest |found - truth|; 0 where both are the same infinity, or the truth is NaN: not to be compared."""
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    with np.errstate(invalid="ignore"):
        return float(np.where((found == truth) | np.isnan(truth), 0.0, np.abs(found - truth)).max(initial=0.0))


def bound(errors: Array, truth: Array, profile: Profile, name: str = "") -> tuple[float, float]:
    """Return (relative, absolute) of the output `name` from the largest errors of all runs, by the module's rule."""
    if not np.isfinite(errors).all():
        raise ValueError(f"the profile {profile.name} cannot compute this: disturbed runs overflow or divide by zero")
    spread = SAFETY * float(errors.mean() + SPREADS * errors.std(ddof=1))
    scale = float(np.abs(truth, where=np.isfinite(truth), out=np.zeros(np.shape(truth))).max(initial=0.0))
    stays_wide = name in ("loss", "losses") or (profile.rotates_in_float32 and name in ("cos", "sin"))
    narrow = profile.rounds == "results" and not stays_wide
    unit, tiny = (profile.round_off, profile.tiny) if narrow else (profile.accumulate, 0.0)
    if scale <= tiny / (2 * unit):  # all zero, or below the normal numbers
        return FLOOR * unit, max(spread, tiny)
    return max(spread / scale, FLOOR * unit), tiny


def _widened(x: Array) -> Array:
    return x.astype(np.float64) if x.dtype.kind in "fV" else x


def _wide_enough(params: Params) -> Params:
    """Widen the weights to float64; of a large model only those whose type keys and values are stored in."""
    if sum(w.size for _, w in named(params)) <= SMALL:
        return map_leaves(params, _widened)
    params = map_leaves(params, lambda w: w)
    for layer in params.layers:
        layer.attention.wk, layer.attention.wv = _widened(layer.attention.wk), _widened(layer.attention.wv)
    return params
