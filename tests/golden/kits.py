"""Small kits whose truths are drawn, not computed: a comparison cannot tell, and ties are where they are wanted."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minimoe.golden import verify

BOUND = 1e-6  # relative, of every float
LAYER = {
    "attention_norm": "N D", "attention.q": "N H·C", "attention.k": "N K·C", "attention.v": "N K·C",
    "attention.q_rotated": "N H C", "attention.k_rotated": "N K C", "attention.scores": "B H T S",
    "attention.probs": "B H T S", "attention.context": "N H·C", "attention.out": "N D", "attention_residual": "N D",
    "ffn_norm": "N D", "gating.logits": "N E", "gating.ids": "N k", "gating.weights": "N k",
    "experts.hidden": "N k F", "experts.slots": "N k D", "experts.out": "N D", "out": "N D",
}  # fmt: skip
SIZES = {"B": 2, "T": 5, "S": 5, "N": 10, "D": 6, "H": 2, "K": 1, "C": 3, "E": 4, "k": 2, "F": 7, "V": 9,
         "H·C": 6, "K·C": 3}  # fmt: skip


def route(logits, k=2):
    """Top-k and its weights, as pinned."""
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, ids, axis=1)
    e = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    return ids, e / e.sum(axis=1, keepdims=True)


def entry(id, call, level, tensors, required=(), **more):
    """A manifest's entry; `tensors` is {name: (letters, array)}."""
    outputs = [
        {
            "name": name, "letters": letters, "shape": list(x.shape),
            "kind": "exact" if x.dtype.kind == "i" else "float",
            "required": not required or name in required,
            "bounds": {} if x.dtype.kind == "i" else {"float32": [BOUND, 0.0], "coarse": [1e-2, 0.0]},
        }
        for name, (letters, x) in tensors.items()
    ]  # fmt: skip
    found = {"id": id, "call": call, "level": level, "why": f"what {id} is for", "settings": {}, "model": None,
             "tags": ["inference"], "profiles": ["float32", "coarse"], "outputs": outputs}  # fmt: skip
    return found | more


def write(folder, cases):
    """Write a kit; `cases` is [(entry, inputs, {name: truth})]. Return its cases by id."""
    for case, inputs, truth in cases:
        path = Path(folder) / "cases" / f"{case['id']}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"inputs/{n}": x for n, x in inputs.items()} | {f"truth/{n}": x for n, x in truth.items()}
        save_file({n: np.array(x, order="C") for n, x in tensors.items()}, path)
    manifest = {"kit": "minimoe golden vectors", "version": 1, "cases": [case for case, _, _ in cases]}
    (Path(folder) / "manifest.json").write_text(json.dumps(manifest))
    return {case.id: case for case in verify.read_kit(folder)[1]}


def gating(logits, forced=False, **more):
    """A case of the gate for these logits."""
    logits = np.asarray(logits, float)
    ids, weights = route(logits)
    truth = {"logits": logits, "ids": ids, "weights": weights}
    tensors = {"logits": ("N E", logits), "ids": ("N k", ids), "weights": ("N k", weights)}
    inputs = {"x": np.zeros((len(logits), 3), np.float32)} | ({"ids": ids} if forced else {})
    return entry("gating/drawn", "gating", "op", tensors, **more), inputs, truth


def model(layers=2, near=(), required=("logits",), mask=None, lead=0.4):
    """A case of a whole model; `near` holds the (layer, token) whose second choice has a lead of so many bounds."""
    rng, tensors = np.random.default_rng(7), {}

    def draw(letters):
        return rng.standard_normal([SIZES[letter] for letter in letters.split()])

    tensors["tok_embeddings"] = "N D", draw("N D")
    for layer in range(layers):
        block = {name: draw(letters) for name, letters in LAYER.items()}
        logits = np.stack([rng.permutation([3.0, 2.0, 1.0, 0.0]) for _ in range(SIZES["N"])])
        for at, token in near:
            if at == layer:
                second, third = np.argsort(-logits[token])[1:3]
                logits[token, third] = logits[token, second] - lead * BOUND * 3  # the bound is 3e-6, 2 bounds 6e-6
        block["gating.logits"] = logits
        block["gating.ids"], block["gating.weights"] = route(logits)
        block["attention.scores"][..., np.triu_indices(5, 1)[0], np.triu_indices(5, 1)[1]] = -np.inf
        tensors |= {f"layers.{layer}.{name}": (LAYER[name], x) for name, x in block.items()}
    tensors |= {"norm": ("N D", draw("N D")), "logits": ("B T V", draw("B T V"))}
    inputs = {"tokens": np.zeros((2, 5), np.int64)} | ({} if mask is None else {"mask": mask})
    return entry("model/drawn", "model", "model", tensors, required), inputs, {n: x for n, (_, x) in tensors.items()}
