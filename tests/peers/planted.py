"""Mistakes planted in transformers' modules while they run: names of the catalogue, and how each comes about here.

Each is a function of pytest's monkeypatch. Mixtral's and Mistral's modules are edited alike.
"""

from functools import partial

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, masking_utils
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.mixtral import modeling_mixtral as mixtral

PLANTED = {}


def _planted(function):
    PLANTED[function.__name__.strip("_").replace("_", "-")] = function
    return function


class _Instead:
    """A module some of whose attributes are other ones."""

    def __init__(self, module, **changed):
        self.__dict__.update(changed)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def _change(patch, name, **changes):
    """In forward passes of the classes of this name (without Mixtral or Mistral), attributes are what `changes` say."""
    for module, family in ((mixtral, "Mixtral"), (mistral, "Mistral")):
        cls = getattr(module, family + name, None)
        if cls is not None:
            patch.setattr(cls, "forward", _with(cls.forward, changes))


def _with(forward, changes):
    def changed(self, *args, **kwargs):
        return forward(_Instead(self, **{key: value(self) for key, value in changes.items()}), *args, **kwargs)

    return changed


def _replace(patch, name, forward):
    """Give the classes of this name another forward."""
    for module, family in ((mixtral, "Mixtral"), (mistral, "Mistral")):
        if hasattr(module, family + name):
            patch.setattr(getattr(module, family + name), "forward", forward)


def _after_loading(patch, edit):
    """Change the weights of every model that is loaded."""
    load = AutoModelForCausalLM.from_pretrained

    def loaded(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            edit(model)
        return model

    patch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def _both(patch, name, function):
    """Replace a function of both modules; function(original, ...)."""
    for module in (mixtral, mistral):
        patch.setattr(module, name, partial(function, getattr(module, name)))


# ---- the norm


@_planted
def norm_weight_missing(patch):
    _change(patch, "RMSNorm", weight=lambda norm: torch.ones_like(norm.weight) + 0 * norm.weight)


@_planted
def eps_outside_the_root(patch):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)

    _replace(patch, "RMSNorm", forward)


@_planted
def mean_subtracted(patch):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    _replace(patch, "RMSNorm", forward)


# ---- positions and attention


@_planted
def rope_interleaved(patch):
    def rotate(_, q, k, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        cos, sin = (x[..., :half].repeat_interleave(2, dim=-1).unsqueeze(unsqueeze_dim) for x in (cos, sin))

        def turn(x):
            return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sin

        return turn(q), turn(k)

    _both(patch, "apply_rotary_pos_emb", rotate)


@_planted
def theta_1e4(patch):
    def angles(config, **_):
        C = config.head_dim
        return 1.0 / 1e4 ** (torch.arange(0, C, 2, dtype=torch.float) / C), 1.0

    for module in (mixtral.MixtralRotaryEmbedding, mistral.MistralRotaryEmbedding):
        patch.setattr(module, "compute_default_rope_parameters", staticmethod(angles))


@_planted
def positions_restarted(patch):
    for model in (mixtral.MixtralModel, mistral.MistralModel):
        patch.setattr(model, "forward", _restarting(model.forward))


def _restarting(forward):
    def restarted(self, *args, past_key_values=None, position_ids=None, **kwargs):
        if past_key_values is not None:
            position_ids = torch.arange(kwargs["input_ids"].shape[1])[None]
        return forward(self, *args, past_key_values=past_key_values, position_ids=position_ids, **kwargs)

    return restarted


@_planted
def kv_heads_tiled(patch):
    _both(patch, "repeat_kv", lambda _, states, groups: states.repeat(1, groups, 1, 1))


@_planted
def attention_scale_missing(patch):
    def unscaled(attend, *args, scaling, **kwargs):
        return attend(*args, scaling=1.0, **kwargs)

    _both(patch, "eager_attention_forward", unscaled)


@_planted
def window_one_wider(patch):
    overlay = masking_utils.sliding_window_overlay
    patch.setattr(masking_utils, "sliding_window_overlay", lambda window: overlay(window + 1))


@_planted
def window_one_narrower(patch):
    overlay = masking_utils.sliding_window_overlay
    patch.setattr(masking_utils, "sliding_window_overlay", lambda window: overlay(window - 1))


@_planted
def k_v_exchanged(patch):
    _change(patch, "Attention", k_proj=lambda a: a.v_proj, v_proj=lambda a: a.k_proj)


# ---- the router and the experts


@_planted
def gate_without_renormalising(patch):
    def forward(self, x):
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        return logits, *torch.topk(logits.float().softmax(dim=-1), self.top_k, dim=-1)

    _replace(patch, "TopKRouter", forward)


@_planted
def gate_chooses_the_smallest(patch):
    def forward(self, x):
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
        probs, ids = torch.topk(logits.float().softmax(dim=-1), self.top_k, dim=-1, largest=False)
        return logits, probs / probs.sum(dim=-1, keepdim=True), ids

    _replace(patch, "TopKRouter", forward)


@_planted
def gate_slots_in_order_of_ids(patch):
    route = mixtral.MixtralTopKRouter.forward

    def forward(self, x):
        logits, weights, ids = route(self, x)
        ids, order = ids.sort(dim=-1)
        return logits, weights.gather(-1, order), ids

    _replace(patch, "TopKRouter", forward)


@_planted
def gate_ids_sorted_without_weights(patch):
    route = mixtral.MixtralTopKRouter.forward

    def forward(self, x):
        logits, weights, ids = route(self, x)
        return logits, weights, ids.sort(dim=-1).values

    _replace(patch, "TopKRouter", forward)


@_planted
def silu_on_w3(patch):
    _change(patch, "Experts", gate_up_proj=lambda e: torch.cat(e.gate_up_proj.chunk(2, dim=1)[::-1], dim=1))
    _change(patch, "MLP", gate_proj=lambda mlp: mlp.up_proj, up_proj=lambda mlp: mlp.gate_proj)


@_planted
def w2_not_transposed(patch):
    def across(w):
        return w.reshape(*w.shape[:-2], w.shape[-1], w.shape[-2]).mT

    _change(patch, "Experts", down_proj=lambda experts: across(experts.down_proj))
    _change(patch, "MLP", down_proj=lambda mlp: partial(F.linear, weight=across(mlp.down_proj.weight)))


@_planted
def gelu_instead_of_silu(patch):
    _change(patch, "Experts", act_fn=lambda _: F.gelu)
    _change(patch, "MLP", act_fn=lambda _: F.gelu)


@_planted
def gate_weights_on_the_input(patch):
    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            n, slot = torch.where(ids == e)
            gate, up = F.linear(x[n] * weights[n, slot, None], self.gate_up_proj[e]).chunk(2, dim=-1)
            out.index_add_(0, n, F.linear(self.act_fn(gate) * up, self.down_proj[e]))
        return out

    _replace(patch, "Experts", forward)


@_planted
def jitter_left_on(patch):
    _change(patch, "SparseMoeBlock", training=lambda _: True, jitter_noise=lambda _: 0.1)


# ---- the block, the model and the losses


@_planted
def experts_residual_forgotten(patch):
    def forward(self, x, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        h = x + self.self_attn(
            hidden_states=self.input_layernorm(x), position_embeddings=position_embeddings,
            attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
        )[0]  # fmt: skip
        return self.mlp(self.post_attention_layernorm(h))

    _replace(patch, "DecoderLayer", forward)


@_planted
def norms_exchanged(patch):
    def exchange(model):
        for layer in model.model.layers:
            norms = layer.input_layernorm, layer.post_attention_layernorm
            norms[0].weight, norms[1].weight = norms[1].weight, norms[0].weight

    _after_loading(patch, exchange)


@_planted
def embeddings_tied(patch):
    _after_loading(patch, lambda model: model.lm_head.weight.copy_(model.model.embed_tokens.weight))


@_planted
def padding_attended_in_order(patch):
    def unmasked(make, *args, attention_mask, **kwargs):
        return make(*args, attention_mask=None if attention_mask is None else attention_mask * 0 + 1, **kwargs)

    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        _both(patch, name, unmasked)


@_planted
def balance_softmax_twice(patch):
    loss = mixtral.load_balancing_loss_func

    def twice(logits, *args):
        return loss(tuple(x.softmax(dim=-1) for x in logits), *args)

    patch.setattr(mixtral, "load_balancing_loss_func", twice)


@_planted
def balance_per_layer_instead_of_concatenated(patch):
    loss = mixtral.load_balancing_loss_func

    def per_layer(logits, *args):
        return sum(loss((x,), *args) for x in logits) / len(logits)

    patch.setattr(mixtral, "load_balancing_loss_func", per_layer)
