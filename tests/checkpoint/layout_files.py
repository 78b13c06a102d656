"""Checkpoints in the layouts of others, put together by the rules of their descriptions, without our code for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from minimoe.config import ModelConfig
from minimoe.params import Params, named


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + C/2 of every head become rows 2i and 2i + 1."""
    out, C = np.empty_like(w), len(w) // heads
    for h in range(heads):
        for i in range(C // 2):
            out[h * C + 2 * i] = w[h * C + i]
            out[h * C + 2 * i + 1] = w[h * C + C // 2 + i]
    return out


def mistral(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    tensors = {}
    for name, w in named(params):
        heads = {"wq": config.num_heads, "wk": config.num_kv_heads}.get(name.rpartition(".")[2])
        tensors[f"{name}.weight"] = w if heads is None else interleaved(w, heads)
    return tensors


def stacked(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    tensors = {name: w for name, w in mistral(config, params).items() if ".feed_forward." not in name}
    for i, layer in enumerate(params.layers):
        f, moe = layer.feed_forward, f"layers.{i}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = f.gate
        tensors[f"{moe}.w1"] = np.concatenate(list(f.w1))
        tensors[f"{moe}.w2"] = np.concatenate([w.T for w in f.w2])
        tensors[f"{moe}.w3"] = np.concatenate(list(f.w3))
    return tensors


def fused(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    tensors = {
        "model.embed_tokens.weight": params.tok_embeddings, "model.norm.weight": params.norm,
        "lm_head.weight": params.output,
    }  # fmt: skip
    for i, layer in enumerate(params.layers):
        a, f, at = layer.attention, layer.feed_forward, f"model.layers.{i}"
        tensors |= {f"{at}.self_attn.{x}_proj.weight": w for x, w in zip("qkvo", (a.wq, a.wk, a.wv, a.wo), strict=True)}
        tensors[f"{at}.input_layernorm.weight"] = layer.attention_norm
        tensors[f"{at}.post_attention_layernorm.weight"] = layer.ffn_norm
        tensors[f"{at}.mlp.gate.weight"] = f.gate
        tensors[f"{at}.mlp.experts.gate_up_proj"] = np.stack(
            [np.concatenate(both) for both in zip(f.w1, f.w3, strict=True)]
        )
        tensors[f"{at}.mlp.experts.down_proj"] = np.stack(list(f.w2))
    return tensors


def params_json(config: ModelConfig) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "dim": config.hidden_size, "n_layers": config.num_layers, "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size, "n_heads": config.num_heads, "n_kv_heads": config.num_kv_heads,
        "norm_eps": config.norm_eps, "vocab_size": config.vocab_size,
    }  # fmt: skip
    if not config.dense:
        raw["moe"] = {"num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_token}
    return raw


def write(folder: Path, tensors: dict[str, np.ndarray], description: dict[str, Any], *files: str) -> Path:
    """Write tensors, dealt out to the files in turn, and params.json, or config.json where it names a model_type."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "config.json" if "model_type" in description else "params.json"
    (folder / name).write_text(json.dumps(description))
    for i, file in enumerate(files):
        mine = {key: np.ascontiguousarray(w) for n, (key, w) in enumerate(tensors.items()) if n % len(files) == i}
        safetensors.numpy.save_file(mine, folder / file)
    return folder
