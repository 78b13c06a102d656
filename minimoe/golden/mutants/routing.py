"""Mistakes in the gate, the experts and the balance loss."""

from __future__ import annotations

from minimoe.golden.cases.draw import GROK
from minimoe.golden.mutants.mutant import Mutant
from minimoe.golden.mutants.planting import room

_EXPS = "exps = xp.exp(chosen - chosen.max(axis=-1, keepdims=True))"
_WEIGHTS = "weights = exps / exps.sum(axis=-1, keepdims=True)"
_ALL = "xp.exp(logits - chosen.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)"
_TOP = 'xp.argsort(-candidates, axis=-1, kind="stable")[:, :k]'
_CHOSEN = "dchosen = weights * (dweights - mean)"
_SCATTERED = "dlogits = scattered if dlogits is None else dlogits + scattered"
_SOFTMAX = (
    "full = matmul(x, gate.T)\n"
    "    full = xp.exp(full - full.max(axis=-1, keepdims=True))\n"
    "    full = full / full.sum(axis=-1, keepdims=True)"
)
_READ = "xp.take_along_axis(matmul(x, gate.T), xp.maximum(ids, 0), axis=-1)"
_GATE = "weights are the softmax over the k chosen logits, so that they add up to 1"
_TIES = "choose by logit, largest first; of equal ones the lower id first"


def _gate(
    name: str, says: str, remedy: str, *edits: tuple[str, str], seen: str = "", inference_only: bool = False,
    harmless: str = "", tag: str = "",
) -> Mutant:  # fmt: skip
    changes = tuple(room("gating", *edit) for edit in edits)
    return Mutant(
        name, says, remedy, "op", changes, seen=seen, inference_only=inference_only, harmless=harmless, tag=tag
    )


GATING = [
    _gate(
        "gate-without-renormalising",
        "weights come from a softmax over all E logits and are not renormalised over the chosen",
        _GATE + ": divide the chosen probabilities by their sum",
        (_WEIGHTS, f"weights = exps / {_ALL}"),
        (_CHOSEN, "dchosen = weights * (dweights if logits is None else dweights - mean)"),
        (_SCATTERED, f"{_SOFTMAX}\n"
         "    scattered = scattered - (0 if logits is not None else full * dchosen.sum(axis=-1, keepdims=True))\n"
         f"    {_SCATTERED}"),
        seen="Switch and Grok-1 mean it so",
    ),
    _gate(
        "gate-softmax-twice",
        "a second softmax is taken over the chosen probabilities",
        _GATE + "; one softmax, over logits",
        (_WEIGHTS, f"exps = xp.exp(exps / {_ALL})\n    {_WEIGHTS}"),
        inference_only=True,
    ),
    _gate(
        "gate-softmax-over-zero-filled",
        "losing logits are set to 0 instead of -inf, and the softmax is over all E",
        _GATE + ": fill losers with -inf",
        (_WEIGHTS, "weights = exps / (exps.sum(axis=-1, keepdims=True)"
         " + (logits.shape[1] - ids.shape[1]) * xp.exp(-chosen.max(axis=-1, keepdims=True)))"),
        inference_only=True,
    ),
    _gate(
        "gate-sigmoid",
        "weights are normalised sigmoids of the chosen logits",
        _GATE,
        (_EXPS, "exps = 1 / (1 + xp.exp(-chosen))"),
        (_CHOSEN, f"{_CHOSEN}\n    dchosen = dchosen / (1 + (0 if logits is not None else xp.exp({_READ})))"),
        seen="DeepSeek-V3 means it so",
    ),
    _gate(
        "gate-chooses-the-smallest",
        "the k smallest logits are chosen: a sort that rises was cut at the wrong end",
        _TIES,
        (_TOP, _TOP.replace("-candidates", "candidates")),
    ),
    _gate(
        "gate-ties-to-the-higher-id",
        "of experts with equal logits the higher id is chosen first",
        _TIES + ": a stable sort",
        (_TOP, 'gate.shape[0] - 1 - xp.argsort(-candidates[:, ::-1], axis=-1, kind="stable")[:, :k]'),
        seen="torch.topk promises no order of ties",
    ),
    _gate(
        "gate-slots-in-order-of-ids",
        "the chosen experts stand in order of their ids instead of their logits",
        "slot 0 is the first choice, slot 1 the second",
        (_TOP, f"xp.sort({_TOP}, axis=-1)"),
        seen="eager loops over experts add in this order",
    ),
    _gate(
        "gate-ids-sorted-without-weights",
        "ids are sorted, but the weights stay in order of the logits: experts get each other's weight",
        "permute ids and weights together",
        ("if ids is None:", "if free := ids is None:"),
        ("weights = xp.where(ids >= 0, weights, 0)",
         "weights = xp.where(ids >= 0, weights, 0)\n    ids = xp.sort(ids, axis=-1) if free else ids"),
        inference_only=True,
    ),
    _gate(
        "gate-logits-in-bfloat16",
        "router logits are rounded to bfloat16 before the top-k: near-ties become ties",
        "compute router logits in float32 or better, whatever the model's type",
        ("from minimoe.arrays import matmul,", "from minimoe.arrays import BFLOAT16, matmul,"),
        ("logits = matmul(x, gate.T)", "logits = matmul(x, gate.T).astype(BFLOAT16).astype(x.dtype)"),
        seen="gpt-fast",
    ),
    _gate(
        "gate-softmax-before-top-k",
        "top-k is over float32 probabilities: of logits about 100 apart the losers underflow to 0 and tie",
        "take top-k over the logits",
        ("-xp.inf)\n        ids", "-xp.inf)\n        candidates = xp.exp((candidates - candidates.max(axis=-1, "
         "keepdims=True)).astype(xp.float32))\n        ids"),
        seen="transformers",
        harmless="the choices that it gets wrong have weights that underflow: the comparison counts them as don't care",
    ),
    _gate(
        "gate-softmax-overflows",
        "exp is taken without subtracting the largest logit, and overflows float32 above 88",
        "subtract the largest chosen logit before exp",
        (_EXPS, "exps = xp.exp(chosen.astype(xp.float32)).astype(chosen.dtype)"),
    ),
    _gate(
        "padding-routed",
        "padding is sent to experts, too",
        "give inactive tokens the ids -1 and the weights 0",
        ("ids = xp.where(active[:, None], ids, -1)", "ids = xp.where(active[:, None] | True, ids, -1)"),
    ),
    _gate(
        "router-untrained-by-its-weights",
        "no gradient flows through the gate weights to the router",
        "differentiate the softmax over the chosen logits; only the choice itself is a constant",
        (_CHOSEN, "dchosen, mean = 0 * weights, 0 * mean"),
    ),
    _gate(
        "balance-gradient-lost",
        "the gradient of the balance loss does not reach the router",
        "add it to the gradient of the router's logits",
        (_SCATTERED, "dlogits = scattered"),
    ),
]  # fmt: skip

_SHARES = "where renormalise is false each chosen expert keeps its share of a softmax over all"
GATING += [
    _gate(
        "gate-renormalised",
        "weights are a softmax over the chosen, though the model wants shares of all experts",
        _SHARES,
        ("if not renormalise:", "if False and not renormalise:"),
        ("-_softmax(logits) * mean", "0 * logits"),
        seen="Mixtral means it so",
        tag=GROK,
    ),
    _gate(
        "gate-softmax-without-switched-off",
        "experts that are switched off are left out of the sum that shares are taken of",
        _SHARES + ", also those that are switched off",
        ("_softmax(logits), xp.max",
         "_softmax(logits if allowed is None else xp.where(allowed, logits, -1e300)), xp.max"),
        inference_only=True,
        tag=GROK,
    ),
    _gate(
        "gate-gradient-of-the-chosen-only",
        "the logits of experts that were not chosen get no gradient, though they stand in the sum",
        "a share of all experts falls where the logit of any other rises: dlogits = -share · Σ weights · dweights",
        ("-_softmax(logits) * mean", "0 * logits"),
        tag=GROK,
    ),
]  # fmt: skip


def _expert(
    name: str, says: str, remedy: str, *edits: tuple[str, str], seen: str = "", inference_only: bool = False,
    tag: str = "",
) -> Mutant:  # fmt: skip
    return Mutant(
        name,
        says,
        remedy,
        "op",
        tuple(room("experts", *edit) for edit in edits),
        seen=seen,
        inference_only=inference_only,
        tag=tag,
    )


def _activation(name: str, says: str, value: str, slope: str) -> Mutant:
    return _expert(
        name, says, "the activation is silu(z) = z · sigmoid(z), also called swish",
        ("return z * sigmoid(z)", f"return {value}"), ("return s * (1 + z * (1 - s))", f"return {slope}"),
        ("from minimoe.arrays import matmul,", "import math\nimport numpy as np\nfrom minimoe.arrays import matmul,"),
    )  # fmt: skip


def _capacity(factor: str) -> Mutant:
    return _expert(
        f"capacity-{factor}",
        f"each expert takes at most {factor} · N · k / E tokens, in their order, and drops the others",
        "serve every token: Mixtral has no capacity",
        ("    flat = ids.reshape(-1)  # (N, k) -> (N k,)\n",
         "    flat = ids.reshape(-1)\n"
         f"    capacity = -int(-{factor} * flat.size // num_experts)\n"
         "    for e in range(num_experts):\n"
         "        mine = flat == e\n"
         "        flat = xp.where(mine & (xp.cumsum(mine) > capacity), -1, flat)\n"),
        seen="Switch, GShard",
    )  # fmt: skip


def _combine(name: str, says: str, factor: str) -> Mutant:
    return _expert(
        name, says, "multiply each expert's output by its gate weight and add",
        ("_sum_slots(weights[:, :, None] * slots)", f"_sum_slots(slots * {factor})"),
        ("dweights = (saved.slots * dout[:, None]).sum(axis=-1)", "dweights = 0 * weights"),
        ("(weights[:, :, None] * dout[:, None])", f"({factor} * xp.repeat(dout[:, None], k, axis=1))"),
    )  # fmt: skip


_ERF = "np.vectorize(math.erf)(z * 0.5**0.5)"
_TANH = "xp_of(z).tanh(0.7978845608028654 * (z + 0.044715 * z**3))"
EXPERTS = [
    _expert(
        "silu-on-w3",
        "silu is applied to w3 · x instead of w1 · x",
        "w2 · (silu(w1 · x) ⊙ (w3 · x)): w1 is Hugging Face's gate_proj, w3 its up_proj",
        ("gate_in[rows] = matmul(xe, w1[e].T)", "gate_in[rows] = matmul(xe, w3[e].T)"),
        ("up[rows] = matmul(xe, w3[e].T)", "up[rows] = matmul(xe, w1[e].T)"),
        ("dw1[e], dw3[e] = ", "dw3[e], dw1[e] = "),
        ("dgate_in @ widen(w1[e]) + dup @ widen(w3[e])", "dgate_in @ widen(w3[e]) + dup @ widen(w1[e])"),
    ),
    _activation("gelu-instead-of-silu", "the experts' activation is GELU", f"z * 0.5 * (1 + {_ERF})",
                f"0.5 * (1 + {_ERF}) + z * xp_of(z).exp(-z * z / 2) * 0.3989422804014327"),
    _activation("gelu-tanh-instead-of-silu", "the experts' activation is GELU in its tanh form",
                f"z * 0.5 * (1 + {_TANH})",
                f"0.5 * (1 + {_TANH}) + z * 0.5 * (1 - {_TANH}**2) * 0.7978845608028654 * (1 + 0.134145 * z * z)"),
    _activation("relu-instead-of-silu", "the experts' activation is ReLU", "xp_of(z).maximum(z, 0)", "(z > 0) * 1.0"),
    _expert(
        "gate-weights-on-the-input",
        "the gate weight multiplies the expert's input instead of its output",
        "weight the outputs: an expert is not linear",
        ("xe = x[pairs[rows] // k]", "xe = weights.reshape(-1, 1)[pairs[rows]] * x[pairs[rows] // k]"),
        ("_sum_slots(weights[:, :, None] * slots)", "_sum_slots(slots)"),
        ("dslots = (weights[:, :, None] * dout[:, None])", "dslots = xp.repeat(dout[:, None], k, axis=1)"),
        ("xe, dy = x[pairs // k], dslots[pairs]",
         "xe, dy = weights.reshape(-1, 1)[pairs] * x[pairs // k], dslots[pairs]"),
        ("return _sum_slots(dx_slots.reshape(N, k, D)), dw1, dw2, dw3, dweights",
         "dxe = dx_slots.reshape(N, k, D)\n"
         "    return _sum_slots(weights[:, :, None] * dxe), dw1, dw2, dw3, (dxe * x[:, None]).sum(axis=-1)"),
    ),
    _combine("gate-weights-ignored-mean", "the outputs of the chosen experts are averaged", "(1 / k)"),
    _combine("gate-weights-ignored-sum", "the outputs of the chosen experts are added without weights", "1.0"),
    _expert(
        "first-choice-only",
        "only the first choice's output is used",
        "add the weighted outputs of all k chosen experts",
        ("for slot in range(1, slots.shape[1]):", "for slot in range(1, 1):"),
        inference_only=True,
    ),
    _expert(
        "w3-forgotten",
        "hidden states are silu(w1 · x) alone: the product with w3 · x is missing",
        "w2 · (silu(w1 · x) ⊙ (w3 · x))",
        ("hidden = act(gate_in[rows], activation) * up[rows]", "hidden = act(gate_in[rows], activation)"),
        inference_only=True,
    ),
    _capacity("1.0"),
    _capacity("1.25"),
    _expert(
        "silu-slope-wrong",
        "the slope of silu is taken to be sigmoid(z)",
        "d silu / dz = s · (1 + z · (1 - s)), s = sigmoid(z)",
        ("return s * (1 + z * (1 - s))", "return s"),
    ),
    _expert(
        "expert-gradient-unweighted",
        "the gradient that reaches an expert is not multiplied by its gate weight",
        "dslots = weights · dout",
        ("(weights[:, :, None] * dout[:, None])", "xp.repeat(dout[:, None], k, axis=1)"),
    ),
]  # fmt: skip
_GELU = "gelu_tanh(z) = z/2 · (1 + tanh(sqrt(2/π) · (z + 0.044715 · z³)))"


def _gelu(name: str, says: str, value: str, slope: str, seen: str = "") -> Mutant:
    """Another activation where GELU in its tanh form is wanted."""
    return _expert(
        name, says, _GELU, ("return z * sigmoid(_bend(z))", f"return {value}"),
        ("return s * (1 + z * (1 - s) * (_ROOT * (1 + 3 * 0.044715 * z * z)))", f"return {slope}"),
        ("from minimoe.arrays import matmul,", "import numpy as np\nfrom minimoe.arrays import matmul,"),
        seen=seen, tag=GROK,
    )  # fmt: skip


EXPERTS += [
    _gelu("gelu-exact-instead-of-tanh", "GELU is computed with erf instead of tanh", f"z * 0.5 * (1 + {_ERF})",
          f"0.5 * (1 + {_ERF}) + z * xp_of(z).exp(-z * z / 2) * 0.3989422804014327",
          seen="Grok-1's port to Hugging Face, torch's default"),
    _gelu("gelu-sigmoid-instead-of-tanh", "GELU is computed as z · sigmoid(1.702 z)", "z * sigmoid(1.702 * z)",
          "sigmoid(1.702 * z) * (1 + 1.702 * z * (1 - sigmoid(1.702 * z)))", seen="QuickGELU"),
    _gelu("silu-instead-of-gelu", "the experts' activation is silu, where the model has GELU", "silu(z)",
          "silu_slope(z)"),
    _expert("gelu-slope-without-the-cubic", "the slope of GELU lacks the slope of its cubic term", _GELU,
            (" * (_ROOT * (1 + 3 * 0.044715 * z * z)))", " * _ROOT)"), tag=GROK),
]  # fmt: skip


def _balance(name: str, says: str, remedy: str, *edits: tuple[str, str], seen: str = "") -> Mutant:
    return Mutant(name, says, remedy, "op", tuple(room("balance_loss", *edit) for edit in edits), seen=seen)


_ONE = "return float(E * (share.mean(axis=0) * mean_probs.mean(axis=0)).sum())"
_LAYERS = "return float(E * (share * mean_probs).sum() / L)"
_SLOPE = "dprobs = (slope * (dloss * E / (L * count)))"
_BACK = "dlogits = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))"
_PROBS = "probs = probs / probs.sum(axis=-1, keepdims=True)"
_FORM = "E · Σ share · mean probability; exact balance gives k"
BALANCE = [
    _balance(
        "balance-softmax-twice",
        "the balance loss takes a softmax of what already are probabilities",
        "one softmax, over the router's logits",
        (_PROBS, f"{_PROBS}\n    probs = xp.exp(probs)\n    {_PROBS}"),
        (_BACK,
         _BACK.replace("dlogits", "dprobs") + "\n    probs = xp.exp(logits - logits.max(axis=-1, keepdims=True))\n"
         f"    {_PROBS}\n    {_BACK}"),
        seen="transformers #45131",
    ),
    _balance(
        "balance-ignores-the-mask",
        "padding counts in the balance loss",
        "leave padding out of the shares, the mean probabilities and the count",
        ("if active is not None:", "if False and active is not None:"),
    ),
    _balance(
        "balance-summed-over-layers",
        "the layers' balance losses are added instead of averaged",
        "take the mean over layers",
        (_LAYERS, _LAYERS.replace(" / L", "")), (_ONE, _ONE.replace("E *", "L * E *")),
        (_SLOPE, _SLOPE.replace("(L * count)", "count")),
    ),
    _balance(
        "balance-without-E",
        "the balance loss is not multiplied by the number of experts",
        _FORM,
        (_LAYERS, _LAYERS.replace("E *", "1 *")), (_ONE, _ONE.replace("E *", "1 *")),
        (_SLOPE, _SLOPE.replace("dloss * E", "dloss")),
    ),
    _balance(
        "balance-averaged-over-slots",
        "the shares are averaged over the k slots instead of added: exact balance gives 1",
        _FORM,
        ("share = chosen.sum(axis=1) / max(count, 1)",
         "share = chosen.sum(axis=1) / max(count, 1) / ids.shape[2]"),
    ),
]  # fmt: skip
MUTANTS = [*GATING, *EXPERTS, *BALANCE]
