"""Correct implementations that share nothing with the package: what the bounds are held against.

Loops and plain float32 arrays, one head and one token at a time. `order` says in which order the sums of a matrix
product run; `rounds` and `kind` add real rounding to a 16-bit type, of the operands of matrix products or of every
result. The routing may be imposed.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import numba
import numpy as np


@numba.njit
def sequential(x, w):
    out = np.zeros((x.shape[0], w.shape[0]), x.dtype)
    for n in range(x.shape[0]):
        for o in range(w.shape[0]):
            total = out[n, o]
            for i in range(x.shape[1]):
                total = total + x[n, i] * w[o, i]
            out[n, o] = total
    return out


def backwards(x, w):
    return sequential(np.ascontiguousarray(x[:, ::-1]), np.ascontiguousarray(w[:, ::-1]))


def pairwise(x, w):
    """Halves first: the error grows with log I only."""
    size = x.shape[1]
    if size <= 2:
        return sequential(x, w)
    half = size // 2
    left = pairwise(np.ascontiguousarray(x[:, :half]), np.ascontiguousarray(w[:, :half]))
    return left + pairwise(np.ascontiguousarray(x[:, half:]), np.ascontiguousarray(w[:, half:]))


@numba.njit
def strided(x, w):
    """Eight running sums, as a vector unit has them."""
    out = np.zeros((x.shape[0], w.shape[0]), x.dtype)
    for n in range(x.shape[0]):
        for o in range(w.shape[0]):
            lanes = np.zeros(8, x.dtype)
            for i in range(x.shape[1]):
                lanes[i % 8] += x[n, i] * w[o, i]
            for lane in range(8):
                out[n, o] += lanes[lane]
    return out


ORDERS = {"sequential": sequential, "backwards": backwards, "pairwise": pairwise, "strided": strided}


class Independent:
    """One implementation.

    Parameters
    ----------
    order : of sums, a key of ORDERS
    rounds, kind : "" or "operands" or "results", and the 16-bit type
    rotates_in_float32 : cos, sin and the rotation stay float32 until the result is rounded
    compute : np.float32, or np.float64
    """

    def __init__(self, order="sequential", rounds="", kind=None, rotates_in_float32=False, compute=np.float32):
        self.products, self.rounds, self.kind, self.compute = ORDERS[order], rounds, kind, compute
        self.rotates_in_float32 = rotates_in_float32

    def run(self, call, inputs, settings, model=None, ids=None):
        """The outputs of a call by name, or None for a call that is not written here; `ids` per asked gate."""
        method = getattr(self, call.replace(".", "_"), None)
        if method is None:
            return None
        self.choices: Iterator | None = None if ids is None else iter(ids)
        given = {name: x.astype(self.compute) if x.dtype.kind in "fV" else x for name, x in inputs.items()}
        with np.errstate(over="ignore"):  # exp(-z) of a very negative z
            return method(**given, **settings, **({} if model is None else {"model": model}))

    # ---- rounding and sums

    def result(self, x):
        return self._round(x) if self.rounds == "results" else x

    def operand(self, x):
        return self._round(x) if self.rounds == "operands" else x

    def _round(self, x):
        return np.asarray(x).astype(self.kind).astype(self.compute)

    def matmul(self, x, w):
        """(N, I), (O, I) -> (N, O)."""
        x, w = (np.ascontiguousarray(self.operand(np.asarray(a).astype(self.compute))) for a in (x, w))
        return self.result(self.products(x, w))

    def total(self, x):
        """(N, I) -> (N,)"""
        return self.products(np.ascontiguousarray(x), np.ones((1, x.shape[1]), x.dtype))[:, 0]

    def softmax(self, z):
        """(N, I), -inf where nothing is; a row of nothing gives zeros."""
        top = z.max(axis=1, keepdims=True)
        e = np.exp(z - np.where(np.isneginf(top), self.compute(0), top))
        total = self.total(e)[:, None]
        return e / np.where(total == 0, self.compute(1), total)

    # ---- ops

    def embedding(self, tokens, table):
        return {"x": np.array([table[t] for t in tokens])}

    def rmsnorm(self, x, weight, eps, residual=None):
        h = x if residual is None else self.result(x + residual)
        mean = self.total(h * h) / self.compute(h.shape[1])
        normed = self.result(h / np.sqrt(mean + self.compute(eps))[:, None])
        y = self.result(normed * weight.astype(self.compute))
        return {"y": y} if residual is None else {"h": h, "y": y}

    def linear(self, x, w):
        return {"y": self.matmul(x, w)}

    def rope(self, x, positions, theta):
        C = x.shape[2]
        wide = np.float32 if self.rounds == "results" else np.float64
        frequency = 1 / wide(theta) ** (np.arange(0, C, 2).astype(wide) / wide(C))
        angle = positions.astype(wide)[:, None] * frequency
        keep = (lambda a: a) if self.rotates_in_float32 else self.result
        cos, sin = (keep(f(angle).astype(self.compute)) for f in (np.cos, np.sin))
        y = np.empty_like(x)
        for i in range(C // 2):
            a, b = x[:, :, i], x[:, :, i + C // 2]
            c, s = cos[:, i : i + 1], sin[:, i : i + 1]
            y[:, :, i] = self.result(keep(a * c) - keep(b * s))
            y[:, :, i + C // 2] = self.result(keep(b * c) + keep(a * s))
        return {"cos": cos, "sin": sin, "y": y}

    def attention(self, q, k, v, q_pos, k_pos, window, scale=None, cap=None):
        B, T, H, C = q.shape
        S, G = k.shape[1], H // k.shape[2]
        scores, probs = np.zeros((B, H, T, S), self.compute), np.zeros((B, H, T, S), self.compute)
        out, factor = np.zeros((B, T, H, C), self.compute), self.compute(C**-0.5 if scale is None else scale)
        for b in range(B):
            far = q_pos[b][:, None] - k_pos[b][None, :]
            seen = (k_pos[b] >= 0)[None] & (far >= 0) & (far < (math.inf if window is None else window))
            for h in range(H):
                # Products may leave float16's range, which the scores do not: there they are rounded once, when scaled.
                product = self.products if self.kind is np.float16 else self.matmul
                z = self.result(product(q[b, :, h], k[b, :, h // G]) * factor)
                z = z if cap is None else self.result(self.compute(cap) * np.tanh(z / self.compute(cap)))
                scores[b, h] = np.where(seen, z, -np.inf)
                probs[b, h] = self.result(self.softmax(scores[b, h]))
                out[b, :, h] = self.matmul(probs[b, h], v[b, :, h // G].T)
        return {"scores": scores, "probs": probs, "out": out}

    def gating(self, x, gate, k, active=None, ids=None, renormalise=True, disabled=()):
        logits = self.matmul(x, gate)
        if ids is None and self.choices is not None:
            ids = next(self.choices)
        if ids is None:
            free = [e for e in range(logits.shape[1]) if e not in disabled]
            ids = np.array([sorted(free, key=lambda e, z=z: (-z[e], e))[:k] for z in logits])
        ids = ids if active is None else np.where(active[:, None], ids, -1)
        at = np.maximum(ids, 0)
        if renormalise:
            weights = self.softmax(np.take_along_axis(logits, at, axis=1))
        else:
            weights = np.take_along_axis(self.softmax(logits), at, axis=1)
        return {"logits": logits, "ids": ids, "weights": np.where(ids >= 0, self.result(weights), 0)}

    def experts(self, x, w1, w2, w3, ids, weights, activation="silu"):
        (N, D), k, F = x.shape, ids.shape[1], w1[0].shape[0]
        hidden, slots = np.zeros((N, k, F), self.compute), np.zeros((N, k, D), self.compute)
        out = np.zeros((N, D), self.compute)
        for n in range(N):
            for slot, e in enumerate(ids[n]):
                if e >= 0:
                    z, up = self.matmul(x[n : n + 1], w1[e]), self.matmul(x[n : n + 1], w3[e])
                    hidden[n, slot] = self.result(self.result(self.activation(z, activation)) * up)[0]
                    slots[n, slot] = self.matmul(hidden[n, slot][None], w2[e])[0]
                    out[n] = self.result(out[n] + self.result(weights[n, slot] * slots[n, slot]))
        return {"hidden": hidden, "slots": slots, "out": out}

    def activation(self, z, name):
        if name == "silu":
            return z / (1 + np.exp(-z))
        inner = self.compute(math.sqrt(2 / math.pi)) * (z + self.compute(0.044715) * z**3)
        return self.compute(0.5) * z * (1 + np.tanh(inner))

    def cross_entropy(self, logits, targets):
        top = logits.max(axis=1)
        lse = top + np.log(self.total(np.exp(logits - top[:, None])))
        losses = np.array([lse[n] - logits[n, t] if t >= 0 else 0 for n, t in enumerate(targets)], self.compute)
        count = max(1, int((targets >= 0).sum()))
        return {"losses": losses, "loss": np.array(self.total(losses[None])[0] / self.compute(count))}

    def balance_loss(self, logits, ids, form, active=None):
        L, N, E = logits.shape
        keep = np.ones(N, bool) if active is None else active
        slots = 1 if form == "switch" else ids.shape[2]
        share, mean = np.zeros((L, E), self.compute), np.zeros((L, E), self.compute)
        for i in range(L):
            probs = self.softmax(logits[i])[keep]
            mean[i] = self.total(probs.T) / self.compute(max(1, keep.sum()))
            for e in range(E):
                share[i, e] = (ids[i, keep, :slots] == e).sum() / max(1, keep.sum())
        if form == "concatenated":
            share, mean = share.mean(axis=0, keepdims=True), mean.mean(axis=0, keepdims=True)
        loss = self.total((share * mean).reshape(1, -1))[0] * self.compute(E) / self.compute(len(share))
        return {"loss": np.array(loss)}

    # ---- the block and the model, from the ops above

    def block(self, x, layer, model, positions=None, mask=None, ids=None):
        B, T, D = x.shape
        positions = self._positions(B, T, mask, positions)
        self.choices = iter([ids]) if ids is not None else self.choices
        found, out = self._block(model.config, model.params.layers[layer], x.reshape(B * T, D), positions)
        return found | {"out": out.reshape(B, T, D)}

    def model(self, tokens, model, mask=None, positions=None, ids=None):
        config, params = model.config, model.params
        B, T = tokens.shape
        positions = self._positions(B, T, mask, positions)
        self.choices = iter(ids) if ids is not None else self.choices
        clean = np.where(positions.reshape(-1) >= 0, tokens.reshape(-1), 0)  # padding may hold anything
        x = self.embedding(clean, params.tok_embeddings.astype(self.compute))["x"]
        found = {"tok_embeddings": x}
        for i, layer in enumerate(params.layers):
            inner, x = self._block(config, layer, x, positions)
            found |= {f"layers.{i}.{name}": a for name, a in inner.items()}
        y = self.rmsnorm(x, params.norm, config.norm_eps)["y"]
        head = params.tok_embeddings if params.output is None else params.output
        return found | {"norm": y, "logits": self.matmul(y, head).reshape(B, T, -1)}

    def model_chunks(self, tokens, chunks, max_length, model):
        """A cache changes nothing: the whole sequence at once, and so the choices of all chunks."""
        if self.choices is not None and not model.config.dense:
            B, asked = len(tokens), list(self.choices)
            by_layer = [asked[i :: model.config.num_layers] for i in range(model.config.num_layers)]
            joined = [np.concatenate([z.reshape(B, -1, z.shape[1]) for z in layer], axis=1) for layer in by_layer]
            self.choices = iter([z.reshape(-1, z.shape[2]) for z in joined])
        return {"logits": self.model(tokens, model)["logits"]}

    def _positions(self, B, T, mask, positions):
        if positions is None:
            positions = np.tile(np.arange(T), (B, 1)) if mask is None else np.cumsum(mask, axis=1) - 1
        return positions if mask is None else np.where(mask, positions, -1)

    def _block(self, config, layer, x, positions):
        (B, T), C, eps = positions.shape, config.head_dim, config.norm_eps
        a, ffn, names = layer.attention, layer.feed_forward, {}
        names["attention_norm"] = y = self.rmsnorm(x, layer.attention_norm, eps)["y"]
        q, k, v = (self.matmul(y, w) for w in (a.wq, a.wk, a.wv))
        names |= {"attention.q": q, "attention.k": k, "attention.v": v}
        flat = positions.reshape(-1)
        q, k = (self.rope(z.reshape(B * T, -1, C), flat, config.rope_theta)["y"] for z in (q, k))
        names |= {"attention.q_rotated": q, "attention.k_rotated": k}
        q, k, v = (z.reshape(B, T, -1, C) for z in (q, k, v))
        inner = self.attention(q, k, v, positions, positions, config.sliding_window)
        names |= {"attention.scores": inner["scores"], "attention.probs": inner["probs"]}
        names["attention.context"] = inner["out"].reshape(B * T, -1)
        names["attention.out"] = self.matmul(names["attention.context"], a.wo)
        residual = self.rmsnorm(names["attention.out"], layer.ffn_norm, eps, x)
        names |= {"attention_residual": residual["h"], "ffn_norm": residual["y"]}
        routed = {"ids": np.zeros((B * T, 1), int), "weights": np.ones((B * T, 1), self.compute)}
        if ffn.gate is not None:
            routed = self.gating(residual["y"], ffn.gate, config.num_experts_per_token)
            names |= {f"gating.{name}": z for name, z in routed.items()}
        routed["ids"] = np.where(flat[:, None] >= 0, routed["ids"], -1)
        mixed = self.experts(residual["y"], ffn.w1, ffn.w2, ffn.w3, routed["ids"], routed["weights"])
        names |= {f"experts.{name}": z for name, z in mixed.items()}
        return names, self.result(residual["h"] + mixed["out"])


def ratios(found, truth, limits):
    """Error over bound of every tensor that has both: {name: ratio}; 0 / 0 is 0."""
    rows = defaultdict(float)
    for name, (relative, absolute) in limits.items():
        if name not in found:
            continue
        t, x = np.asarray(truth[name], np.float64), np.asarray(found[name], np.float64)
        assert x.shape == t.shape, f"{name}: {x.shape}, not {t.shape}"
        with np.errstate(invalid="ignore"):
            off = np.where((x == t) | np.isnan(t), 0.0, np.abs(x - t)).max(initial=0.0)
        finite = np.abs(t[np.isfinite(t)]).max(initial=0.0)
        rows[name] = off / (relative * finite + absolute) if off else 0.0
    return dict(rows)
