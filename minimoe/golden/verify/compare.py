"""One case against its truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .cause import find_cause, split_layer
from .kit import Case, KitError, Output, is_routing
from .measure import measure, read_array
from .results import CaseResult, Decision, TensorResult
from .words import brief, similar

_BEFORE_ATTENTION = ("tok_embeddings", "attention_norm", "attention.q", "attention.k", "attention.v",
                     "attention.q_rotated", "attention.k_rotated")  # fmt: skip


def compare(case: Case, outputs: Mapping[str, Any], profile: str = "float32") -> CaseResult:
    """Hold a candidate's outputs of a case against the truth.

    Floats may come in any float type and memory order (bfloat16 as float32, or in ml_dtypes' type), integers in any
    integer type. Where the truth is -inf (scores of keys that cannot be seen), -inf and whatever is at most `HIDDEN`
    fit; where it is NaN (padding), anything does, and routing of padding is not compared. What follows a decision that
    is not the golden one is left out: the rows of that token, and in later layers those of the tokens after it. Where
    the routing is not given, what a near tie may have changed is left out if it does not fit, and if anything remains.

    Raises
    ------
    KitError
        If the case has no bounds for this profile, or its own file is broken.
    """
    if profile not in case.profiles:
        raise KitError(f"{case.id}: has no bounds for profile {profile!r}; it has {', '.join(case.profiles)}")
    result = CaseResult(case.id, case.call, case.level, case.why)
    if not isinstance(outputs, Mapping):
        result.problem = f"the outputs are {type(outputs).__name__}, not a dict of arrays by name"
        return result
    comparison = _Comparison(case, outputs, profile)
    result.tensors = [t for output in case.outputs if (t := comparison.tensor(output)) is not None]
    result.decisions, result.doubted = comparison.decisions, comparison.doubted
    known = [output.name for output in case.outputs]
    extra = [str(name) for name in outputs if name not in known]
    result.tensors += [TensorResult(n, "extra", says=f"no output of this case{similar(n, known)}") for n in extra]
    result.cause = find_cause(case, result.tensors)
    if comparison.doubts and (result.doubted or result.first_failure):
        says = f"{', '.join(result.doubted)} may follow from near ties in" if result.doubted else "near ties are in"
        result.notes.append(f"{says} {_few(comparison.doubts)}: give these outputs, to see which experts won")
    if left := int(np.isfinite(comparison.flipped).sum()):
        result.notes.append(
            f"{left} of {comparison.flipped.size} tokens follow other experts, and are left out from there on"
        )
    return result


class _Comparison:
    """Goes through the outputs of one case in execution order, and knows which rows can still be compared."""

    def __init__(self, case: Case, outputs: Mapping[str, Any], profile: str) -> None:
        self.case, self.outputs, self.profile = case, outputs, profile
        self.inputs, self.truth = case.inputs, case.truth
        self.decisions: list[Decision] = []
        self.arrays: dict[str, np.ndarray] = {}  # the candidate's, as far as they could be read
        tokens = self.inputs.get("x" if case.level == "block" else "tokens", np.zeros(0))
        ids = case.golden_ids
        grid = tokens.shape[:2] if case.level in ("block", "model") else (1, 0 if ids is None else ids.shape[-2])
        mask = self.inputs.get("mask") if case.level in ("block", "model") else None
        self.padding = np.zeros(grid, bool) if mask is None else ~mask.astype(bool)  # (B, T)
        self.last = max((split_layer(o.name)[0] or 0 for o in case.outputs), default=0)
        self.flipped = np.full(grid, np.inf)  # (B, T): the first layer in which the choice is not the golden one
        self.doubtful = np.full(grid, np.inf)  # (B, T): the first layer in which it may be another, and is not given
        self.doubts: list[str] = []  # outputs, not given, in which it may be
        self.doubted: list[str] = []  # outputs that do not fit where it may be

    def bound(self, name: str) -> float:
        """What the error of an output may be; 0 where the kit gives no bound."""
        bounds = next((o.bounds.get(self.profile) for o in self.case.outputs if o.name == name), None)
        finite = np.abs(self.truth[name][np.isfinite(self.truth[name])])
        return 0.0 if bounds is None else bounds[0] * float(finite.max(initial=0.0)) + bounds[1]

    def tensor(self, output: Output) -> TensorResult | None:
        """Compare one output; None where an optional one is not given."""
        result, name = TensorResult(output.name), output.name
        if name not in self.truth:
            raise KitError(f"{self.case.kit}: {self.case.id} has no truth for its output {name!r}")
        if name not in self.outputs:
            unknown = [str(n) for n in self.outputs if n not in [o.name for o in self.case.outputs]]
            result.status, result.says = "missing", f"not given{similar(name, unknown)}"
            self.doubt(output)
            return result if output.required else None
        truth = self.truth[name]
        array, result.status, result.says = read_array(self.outputs[name], truth, output)
        if array is None:
            return result
        self.arrays[name] = array
        keep = self.comparable(output, self.flipped)
        if is_routing(self.case, name):
            return self.routing(output, array, keep & self.comparable(output, self.doubtful))
        array, truth, keep = self.follow(output, array, truth, keep)
        if output.kind == "float" and self.profile not in output.bounds:
            result.status, result.says = "not comparable", f"the kit has no bound for it in profile {self.profile}"
            return result
        result = measure(result, output, array, truth, keep, self.bound(name))
        sure = keep & self.comparable(output, self.doubtful)
        if result.failed and sure.any() and not sure[keep].all():
            result = measure(TensorResult(name), output, array, truth, sure, self.bound(name))
            self.doubted += [] if result.failed else [name]
        return result

    def comparable(self, output: Output, flipped: np.ndarray) -> np.ndarray:
        """Which elements are neither padding nor follow another choice of experts, first `flipped` (B, T) layers on."""
        layer, stage = self.place(output.name)
        early = np.logical_or.accumulate(flipped < layer, axis=1)  # attention carries it to later tokens
        mixed = np.logical_or.accumulate(flipped < layer - 1, axis=1)  # it did so already in the layer before
        gone = {0: mixed | (flipped < layer), 1: early, 2: early | (flipped <= layer)}[stage]
        letters = output.letters.split()
        rows = self.padding | gone
        if "N" in letters:
            rows, axes = rows.reshape(-1), [letters.index("N")]
        elif "B" in letters and "T" in letters:
            axes = [letters.index("B"), letters.index("T")]
        else:
            return np.full(output.shape, not gone.any())
        if rows.shape != tuple(output.shape[i] for i in axes):
            return np.ones(output.shape, bool)
        shape = [n if i in axes else 1 for i, n in enumerate(output.shape)]
        return np.broadcast_to(~rows.reshape(shape), output.shape)

    def place(self, name: str) -> tuple[int, int]:
        """The layer of an output, and 0 before attention mixes tokens, 1 before the experts, 2 after them."""
        layer, inner = split_layer(name)
        if self.case.level == "op":
            return 0, 1
        if self.case.level == "model" and layer is None and name != "tok_embeddings":
            return self.last, 2  # the final norm and the logits
        if inner in _BEFORE_ATTENTION:
            return layer or 0, 0
        return layer or 0, 1 if inner.startswith(("attention", "ffn_norm", "gating")) else 2

    def routing(self, output: Output, ids: np.ndarray, keep: np.ndarray) -> TensorResult:
        """Class every choice that is not the golden one; remember which tokens follow another choice from here on."""
        golden, prefix = self.truth[output.name], output.name.removesuffix("ids")
        logits, weights = self.truth.get(prefix + "logits"), self.truth.get(prefix + "weights")
        layer = self.place(output.name)[0]
        wrong = np.zeros(golden.shape, bool)
        for token in np.flatnonzero(((ids != golden) & keep).any(axis=1)):
            known = logits is not None and weights is not None
            kinds = self.classify(prefix, golden[token], ids[token], int(token)) if known else {}
            for slot in np.flatnonzero(ids[token] != golden[token]):
                kind, margin = kinds.get(int(slot), ("wrong expert", math.inf))
                weight = math.nan if weights is None else float(weights[token, slot])
                found = (int(golden[token, slot]), int(ids[token, slot]), kind, margin, weight)
                self.decisions.append(Decision(output.name, int(token), int(slot), *found))
                wrong[token, slot] = self.decisions[-1].wrong
                # A weight that vanishes even in float32 changes nothing, and another order of the same experts neither.
                if not (kind == "don't care" and weight < 2.0**-24) and set(ids[token]) != set(golden[token]):
                    at = np.unravel_index(token, self.flipped.shape)
                    self.flipped[at] = min(self.flipped[at], layer)
        return measure(TensorResult(output.name), output, np.where(wrong, ids, golden), golden, keep, 0.0)

    def classify(self, prefix: str, golden: np.ndarray, ids: np.ndarray, token: int) -> dict[int, tuple[str, float]]:
        """Return {slot: (kind, margin)} of the slots in which a token's experts differ."""
        logits, own = self.truth[prefix + "logits"][token], self.arrays.get(prefix + "logits")
        allowed, weight_bound = 2 * self.bound(prefix + "logits"), self.bound(prefix + "weights")
        sound = len(set(ids)) == len(ids) and min(*ids, *golden) >= 0 and max(ids) < len(logits)
        if not sound or "ids" in self.inputs:  # imposed choices do not follow from the logits
            return {}
        weight = dict(zip(golden, self.truth[prefix + "weights"][token], strict=True))
        # Experts of one token only are paired by their rank: a change of all logits within the bound keeps such pairs.
        left = sorted(set(golden) - set(ids), key=lambda e: -logits[e])
        came = sorted(set(ids) - set(golden), key=lambda e: -logits[e])
        instead = dict(zip(came, left, strict=True))
        found = {}
        for slot in np.flatnonzero(ids != golden):
            chosen = ids[slot]
            rivals = {golden[slot], instead.get(chosen, golden[slot])}
            gap = float(min(abs(logits[rival] - logits[chosen]) for rival in rivals))
            near = gap / allowed if allowed else math.inf if gap else 0.0
            if near <= 1:
                tied = own is not None and any(own[token, rival] == own[token, chosen] for rival in rivals)
                kind = "tie" if tied and gap == 0 else "near tie"
            elif weight[golden[slot]] <= weight_bound and weight.get(chosen, 0.0) <= weight_bound:
                kind = "don't care"
            else:
                kind = "order" if chosen in weight else "wrong expert"
            found[int(slot)] = kind, near
        return found

    def follow(self, output: Output, array: np.ndarray, truth: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, ...]:
        """Where a candidate's experts are other ones, or in another order: hold each slot against its own expert's."""
        prefix = output.name.removesuffix(split_layer(output.name)[1])
        routed = "ids" if self.case.call == "gating" else f"{prefix}gating.ids"
        logits = self.truth.get(routed.removesuffix("ids") + "logits")
        if output.letters.split()[:2] != ["N", "k"] or routed not in self.arrays or logits is None:
            return array, truth, keep
        ids, golden = self.arrays[routed], self.truth[routed]
        if output.name.endswith("weights"):  # those that the golden logits give to the experts that it did choose
            rows = (ids != golden).any(axis=1) & (ids >= 0).all(axis=1) & (ids < logits.shape[1]).all(axis=1)
            chosen = np.take_along_axis(logits[rows], ids[rows], axis=1)
            shared = chosen if next(o.renormalised for o in self.case.outputs if o.name == routed) else logits[rows]
            top = shared.max(axis=1, keepdims=True)
            truth = truth.copy()
            truth[rows] = np.exp(chosen - top) / np.exp(shared - top).sum(axis=1, keepdims=True)
            return array, truth, keep
        same = golden[:, :, None] == ids[:, None, :]  # (N, k golden, k candidate)
        slots = same.argmax(axis=2)[:, :, None]
        return np.take_along_axis(array, slots, axis=1), truth, keep & same.any(axis=2)[:, :, None]

    def doubt(self, output: Output) -> None:
        """Remember which tokens may have gone to other experts by roundings alone, where the routing is not given.

        Exact ties are none of these: which expert wins is pinned.
        """
        name, logits = output.name, output.name.removesuffix("ids") + "logits"
        if not is_routing(self.case, name) or logits not in self.truth or "ids" in self.inputs:
            return
        k, layer = self.truth[name].shape[1], self.place(name)[0]
        ordered = -np.sort(-self.truth[logits], axis=1)
        margins = ordered[:, k - 1 : k] - ordered[:, k : k + 1]  # (N, 1); none where k = E
        near = ((margins > 0) & (margins <= 2 * self.bound(logits))).any(axis=1)
        if near.any() and near.size == self.doubtful.size:
            near = near.reshape(self.doubtful.shape) & ~self.padding
            self.doubtful[near] = np.minimum(self.doubtful[near], layer)
            self.doubts.append(name)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def force_routing(case: Case, result: CaseResult, run: Callable[[np.ndarray], Mapping[str, Any]], profile: str) -> None:
    """Where experts are not the golden ones, compare a second run on which the golden ones are imposed.

    If all is right then, the choice was the mistake and the rest its consequence. The rows that a near tie had left
    out are compared too. What is found is put into `result.forced`, or its notes if the run fails.

    Parameters
    ----------
    run : called with the golden ids, (N, k) or (L, N, k); returns outputs by name
    """
    ids = case.golden_ids
    if not result.decisions or ids is None or "ids" in case.inputs:
        return
    try:
        outputs = run(ids)
    except (Exception, SystemExit) as error:
        result.notes.append(f"could not be run with the golden experts: {brief(error)}")
        return
    result.forced = forced = compare(case, outputs, profile)
    if forced.status == "pass":
        result.notes.append("with the golden experts imposed everything fits: only the choice differs")
    else:
        wrong = forced.first_failure
        result.notes.append(f"with the golden experts imposed {wrong.name if wrong else 'it'} is still wrong")
