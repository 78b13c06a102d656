"""transformers' Mixtral and Mistral with our weights; under `lifted()` they compute in true float64."""

import numpy as np
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from minimoe.golden.examples.lifted import lifted
from minimoe.golden.examples.transformers_inside import by_our_names
from minimoe.params import named

__all__ = ["build", "lifted", "logits", "loss_and_grads"]


def build(config, params, dtype=torch.float64):
    """Their model of `config`, eager throughout, with the weights of `params`."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    if config.dense:
        model = MistralForCausalLM(MistralConfig(**common))
    else:
        theirs = MixtralConfig(
            **common,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_token,
            router_aux_loss_coef=config.balance_coefficient,
            output_router_logits=True,
            experts_implementation="eager",
        )
        model = MixtralForCausalLM(theirs)
    weights = {
        name: torch.tensor(array, dtype=dtype) for name, array in _to_theirs(config, dict(named(params))).items()
    }
    missing, unexpected = model.to(dtype).load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    return model.eval()


def logits(model, tokens, mask=None, positions=None):
    """Their logits (B, T, V); what stands at padding is of no meaning."""
    with torch.no_grad():
        return model(**_inputs(tokens, mask, positions), output_router_logits=False).logits.numpy()


def loss_and_grads(model, config, tokens, mask=None):
    """Their training loss, and its gradients under our names.

    A target counts where it and its predecessor are unmasked: theirs ignores the label -100.
    """
    labels = np.array(tokens)
    if mask is not None:
        labels[~mask] = -100
        labels[:, 1:][~mask[:, :-1]] = -100
    model.zero_grad()
    loss = model(**_inputs(tokens, mask, None), labels=torch.tensor(labels)).loss
    loss.backward()
    return loss.item(), by_our_names(model, lambda p: p.grad.numpy())


def _inputs(tokens, mask, positions):
    """Their models count padding as positions unless told otherwise; position 0 stands for ours of -1."""
    if mask is None:
        given = {"input_ids": torch.tensor(tokens)}
    else:
        given = {"input_ids": torch.tensor(np.where(mask, tokens, 0)), "attention_mask": torch.tensor(mask).long()}
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0) if positions is None else positions
    return given if positions is None else given | {"position_ids": torch.tensor(positions)}


_OUTER = {"tok_embeddings": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}
_INNER = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    **{f"attention.w{x}": f"self_attn.{x}_proj.weight" for x in "qkvo"},
    "feed_forward.gate": "mlp.gate.weight",
    "feed_forward.w1": "mlp.gate_proj.weight",
    "feed_forward.w2": "mlp.down_proj.weight",
    "feed_forward.w3": "mlp.up_proj.weight",
}


def _their_name(name):
    if name in _OUTER:
        return _OUTER[name]
    _, layer, inner = name.split(".", 2)
    return f"model.layers.{layer}.{_INNER[inner]}"


def _to_theirs(config, arrays):
    """Their state in memory: the experts of a layer stacked, w1's rows before w3's."""
    found = {_their_name(name): array for name, array in arrays.items() if ".experts." not in name}
    if not config.dense:
        for i in range(config.num_layers):
            experts = [f"layers.{i}.feed_forward.experts.{e}." for e in range(config.num_experts)]
            both = [np.concatenate([arrays[e + "w1"], arrays[e + "w3"]]) for e in experts]
            found[f"model.layers.{i}.mlp.experts.gate_up_proj"] = np.stack(both)
            found[f"model.layers.{i}.mlp.experts.down_proj"] = np.stack([arrays[e + "w2"] for e in experts])
    return found
