"""A small Mixtral in plain PyTorch that answers a golden kit through files. A template for ports to other languages.

    python plain_pytorch.py KIT OUTPUTS [CASE ...]

reads the kit (manifest.json, cases/, models/), computes the cases whose call it offers, and writes
OUTPUTS/<case>.safetensors. It needs torch and safetensors only. Each function below is one call of the kit: it takes
the inputs and settings by name, and returns the outputs by name; only the required ones would do, but the others tell
the kit where a mistake began.
"""

# mypy: ignore-errors

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu, softmax

# ---- the ops. Letters: B batch, T queries, S keys, D width, H heads, K key/value heads, C head width, N tokens (B·T),
# E experts, F expert width, k experts per token, V vocabulary.


def embedding(tokens, table):
    """x[n] = table[tokens[n]]"""
    return {"x": table[tokens]}


def linear(x, w):
    """y = x · wᵀ: weights are (out, in)"""
    return {"y": x @ w.T}


def rmsnorm(x, weight, eps, residual=None):
    """y = h / sqrt(mean(h²) + eps) · weight, h = x + residual"""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps) * weight  # eps inside the root
    return {"y": y} if residual is None else {"h": h, "y": y}


def rope(x, positions, theta):
    """Rotate the pairs (i, i + C/2) of every head by position · theta^(-2i/C)."""
    C = x.shape[-1]
    frequencies = theta ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
    angles = positions[:, None] * frequencies  # (N, C/2), in float64: float32 is too coarse at far positions
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)  # the pairs are (i, i + C/2)
    c, s = cos[:, None], sin[:, None]  # the same for all heads
    return {"cos": cos, "sin": sin, "y": torch.cat([a * c - b * s, b * c + a * s], dim=-1)}


def attention(q, k, v, q_pos, k_pos, window):
    """Key s is visible to query t where k_pos[s] >= 0 and 0 <= q_pos[t] - k_pos[s] < window."""
    G = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)  # query head h reads key/value head h // G
    distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]  # (B, 1, T, S)
    visible = (k_pos[:, None, None, :] >= 0) & (distance >= 0)  # position -1 is padding
    if window is not None:
        visible &= distance < window  # so many keys, the query's own among them
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~visible, -math.inf)
    probs = softmax(scores, dim=-1).where(visible.any(dim=-1, keepdim=True), 0)  # zeros where no key is visible
    return {"scores": scores, "probs": probs, "out": torch.einsum("bhts,bshc->bthc", probs, v)}


def gating(x, gate, k, active=None, ids=None):
    """The k largest of x · gateᵀ, ties to the lower id; softmax over the chosen. `ids`: a choice that is imposed."""
    logits = x @ gate.T
    if ids is None:
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]  # stable: ties go to the lower id
        if active is not None:
            ids = torch.where(active[:, None], ids, -1)  # padding is not routed
    weights = softmax(logits.gather(1, ids.clamp(min=0)), dim=-1)  # over the chosen only
    return {"logits": logits, "ids": ids, "weights": torch.where(ids >= 0, weights, 0)}


def experts(x, w1, w2, w3, ids, weights):
    """out = Σ over slots of weight · w2·(silu(w1·x) ⊙ w3·x); a slot whose id is -1 adds nothing."""
    (N, D), (_, k), F = x.shape, ids.shape, w1[0].shape[0]
    hidden, slots = x.new_zeros(N, k, F), x.new_zeros(N, k, D)
    for e in range(len(w1)):
        n, slot = torch.where(ids == e)
        hidden[n, slot] = silu(x[n] @ w1[e].T) * (x[n] @ w3[e].T)
        slots[n, slot] = hidden[n, slot] @ w2[e].T
    return {"hidden": hidden, "slots": slots, "out": (weights[:, :, None] * slots).sum(dim=1)}


# ---- the block and the model


class Checkpoint:
    """A Hugging Face folder: config.json and model.safetensors."""

    def __init__(self, folder):
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        rope_parameters = self.config.get("rope_parameters") or self.config  # version 5, or version 4
        self.theta = rope_parameters["rope_theta"]

    def __getitem__(self, name):
        if name == "lm_head.weight" and self.config["tie_word_embeddings"]:
            name = "model.embed_tokens.weight"
        return self.tensors[name]

    def experts(self, prefix):
        """w1, w2 and w3 of a layer's experts, as lists; a dense model (Mistral) has one, under other names."""
        if "num_local_experts" not in self.config:
            return [[self[f"{prefix}mlp.{name}_proj.weight"]] for name in ("gate", "down", "up")]
        one = prefix + "block_sparse_moe.experts.{}.{}.weight"
        return [[self[one.format(e, w)] for e in range(self.config["num_local_experts"])] for w in ("w1", "w2", "w3")]


def block(model, x, layer, positions=None, mask=None, ids=None):
    """h = x + Attention(Norm(x)), out = h + Experts(Norm(h))."""
    (B, T, D), C, eps, prefix = x.shape, model.head_dim, model.config["rms_norm_eps"], f"model.layers.{layer}."
    positions = positions_of(torch.ones(B, T, dtype=torch.bool) if mask is None else mask, positions)
    x, pos, attn = x.reshape(B * T, D), positions.reshape(-1), prefix + "self_attn."

    y = rmsnorm(x, model[prefix + "input_layernorm.weight"], eps)["y"]
    q, k, v = (y @ model[f"{attn}{name}_proj.weight"].T for name in "qkv")
    q_rotated = rope(q.reshape(B * T, -1, C), pos, model.theta)["y"]
    k_rotated = rope(k.reshape(B * T, -1, C), pos, model.theta)["y"]
    heads = (a.reshape(B, T, -1, C) for a in (q_rotated, k_rotated, v))
    attended = attention(*heads, positions, positions, model.config.get("sliding_window"))
    context = attended["out"].reshape(B * T, -1)
    out = context @ model[attn + "o_proj.weight"].T
    found = {"attention_norm": y, "attention.q": q, "attention.k": k, "attention.v": v}
    found |= {"attention.q_rotated": q_rotated, "attention.k_rotated": k_rotated}
    found |= {f"attention.{name}": attended[name] for name in ("scores", "probs")}
    found |= {"attention.context": context, "attention.out": out}

    normed = rmsnorm(out, model[prefix + "post_attention_layernorm.weight"], eps, residual=x)
    found |= {"attention_residual": normed["h"], "ffn_norm": normed["y"]}
    if "num_local_experts" in model.config:
        gate, k = model[prefix + "block_sparse_moe.gate.weight"], model.config["num_experts_per_tok"]
        routed = gating(normed["y"], gate, k, pos >= 0, ids)
        found |= {f"gating.{name}": a for name, a in routed.items()}
    else:
        routed = {"ids": torch.where(pos >= 0, 0, -1)[:, None], "weights": (pos >= 0).to(x.dtype)[:, None]}
    mixed = experts(normed["y"], *model.experts(prefix), routed["ids"], routed["weights"])
    found |= {f"experts.{name}": a for name, a in mixed.items()}
    return found | {"out": (normed["h"] + mixed["out"]).reshape(B, T, D)}


def decoder(model, tokens, mask=None, positions=None, ids=None):
    """Embed, run the blocks, norm, logits."""
    (B, T), D = tokens.shape, model.config["hidden_size"]
    mask = torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    x = model["model.embed_tokens.weight"][torch.where(mask, tokens, 0)]
    found = {"tok_embeddings": x.reshape(B * T, D)}
    for i in range(model.config["num_hidden_layers"]):
        inner = block(model, x, i, positions, mask, None if ids is None else ids[i])
        x = inner["out"]
        found |= {f"layers.{i}.{name}": a for name, a in (inner | {"out": x.reshape(B * T, D)}).items()}
    found["norm"] = rmsnorm(x.reshape(B * T, D), model["model.norm.weight"], model.config["rms_norm_eps"])["y"]
    return found | {"logits": (found["norm"] @ model["lm_head.weight"].T).reshape(B, T, -1)}


def positions_of(mask, positions=None):
    """Count the tokens that are not padding, from 0; padding is -1."""
    positions = mask.long().cumsum(dim=1) - 1 if positions is None else positions
    return torch.where(mask, positions, -1)


# ---- the kit


OFFERED = {
    "embedding": embedding, "linear": linear, "rmsnorm": rmsnorm, "rope": rope, "attention": attention,
    "gating": gating, "experts": experts, "block": block, "model": decoder,
}  # fmt: skip


def main(kit, outputs, *wanted):
    """Answer the cases of a kit."""
    kit, outputs = Path(kit), Path(outputs)
    for case in json.loads((kit / "manifest.json").read_text())["cases"]:
        if case["call"] not in OFFERED or "grok" in case["tags"] or (wanted and case["id"] not in wanted):
            continue
        tensors = load_file(kit / "cases" / f"{case['id']}.safetensors")
        inputs = {name.removeprefix("inputs/"): x for name, x in tensors.items() if name.startswith("inputs/")}
        model = [] if case["model"] is None else [Checkpoint(kit / "models" / case["model"])]
        found = OFFERED[case["call"]](*model, **inputs, **case["settings"])
        file = outputs / f"{case['id']}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        names = [output["name"] for output in case["outputs"] if output["name"] in found]
        save_file({name: found[name].contiguous() for name in names}, file)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with torch.no_grad():
        main(*sys.argv[1:])
