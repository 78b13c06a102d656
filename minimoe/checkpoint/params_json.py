"""Mistral's words for ours: params.json both ways, and whether it agrees with a config.json beside it.

It says nothing of what mistral-inference does not need: the length of the context, the tokens that begin and end a
text, the balance loss. We write those under a key of our own; a file without it means Mixtral's. Its keys are few, so
one that is not known here is refused. A base of the rotary angles that is not given is 1e6, or 1e4 with a window, as
mistral-inference took it. Source: https://github.com/mistralai/mistral-inference, args.py and moe.py.
"""

from __future__ import annotations

import re
from typing import Any

from minimoe.checkpoint.errors import ConfigFileError, listed, shown
from minimoe.config import ConfigError, ModelConfig

_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_heads",
    "n_kv_heads": "num_kv_heads",
    "norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
}
_OPTIONAL = {"rope_theta": "rope_theta", "sliding_window": "sliding_window", "tied_embeddings": "tie_embeddings"}
_MOE = {"num_experts": "num_experts", "num_experts_per_tok": "num_experts_per_token"}
# Keys that change nothing here, and the values at which they do.
_NEUTRAL: dict[str, tuple[Any, ...]] = {"model_type": ("transformer",), "use_biases": (False,), "lora": (None,)}
_IGNORED = ("max_batch_size", "max_seq_len", "max_position_embeddings")
_EXTRAS = "minimoe"


def config_from_params(raw: dict[str, Any], where: str) -> ModelConfig:
    """Return the config that a params.json describes.

    Parameters
    ----------
    raw : its contents
    where : its path, for messages

    Raises
    ------
    ConfigFileError
        If it describes no model of ours; the message names the key.
    """
    fields = _given(raw, where)
    window = fields.setdefault("sliding_window", None)
    fields.setdefault("rope_theta", 1e6 if window is None else 1e4)
    if "num_experts" not in fields:
        fields |= {"dense": True, "num_experts": 1, "num_experts_per_token": 1}
    extras = raw.get(_EXTRAS, {})
    known = _extra_fields()
    if not isinstance(extras, dict) or not set(extras) <= set(known):
        raise ConfigFileError(f"{where}: {_EXTRAS} may hold {listed(known)}, not {shown(extras)}")
    try:
        return ModelConfig(**fields, **extras)
    except ConfigError as error:
        theirs = {ours: key for key, ours in (_FIELDS | _OPTIONAL | _MOE).items()}
        message = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
        raise ConfigFileError(f"{where}: {shown(message)}") from None


def _extra_fields() -> list[str]:
    """Fields of ours that params.json has no key for: whatever is added to the config is among them."""
    theirs = {*_FIELDS.values(), *_OPTIONAL.values(), *_MOE.values(), "dense"}
    return [name for name in ModelConfig.__dataclass_fields__ if name not in theirs]


def _given(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of ours that the file gives a value."""
    moe = raw.get("moe")
    if moe is not None and (not isinstance(moe, dict) or set(moe) != set(_MOE)):
        raise ConfigFileError(f"{where}: moe must hold {' and '.join(_MOE)}, not {shown(moe)}")
    known = {*_FIELDS, *_OPTIONAL, *_IGNORED, "moe", _EXTRAS}
    wrong = [
        key
        for key, value in raw.items()
        if key not in known and value is not None and not any(value == neutral for neutral in _NEUTRAL.get(key, ()))
    ]
    if wrong:
        given = listed([f"{key} = {shown(raw[key])}" for key in wrong])
        raise ConfigFileError(f"{where}: asks for what minimoe does not have, or does not know: {given}")
    if missing := [key for key in _FIELDS if raw.get(key) is None]:
        raise ConfigFileError(f"{where}: lacks {', '.join(missing)}")
    names = _FIELDS | _OPTIONAL
    found = {ours: raw[key] for key, ours in names.items() if raw.get(key) is not None}
    return found | ({} if moe is None else {ours: moe[key] for key, ours in _MOE.items()})


def refuse_disagreement(config: ModelConfig, raw: dict[str, Any], where: str) -> None:
    """Raise ConfigFileError unless a params.json says the same as the config.json beside it, where it says anything."""
    config_from_params(raw, where)  # what is wrong with it alone
    dense = {"num_experts": 1} if raw.get("moe") is None else {}
    theirs = {ours: key for key, ours in (_FIELDS | _OPTIONAL).items()} | {
        ours: f"moe.{key}" for key, ours in _MOE.items()
    }
    wrong = [
        f"{theirs[ours]} = {shown(value)}, there {ours} = {shown(getattr(config, ours))}"
        for ours, value in (dense | _given(raw, where)).items()
        if value != getattr(config, ours)
    ]
    if wrong:
        raise ConfigFileError(f"{where}: contradicts config.json in the same folder: {listed(wrong)}")


def config_to_params(config: ModelConfig) -> dict[str, Any]:
    """Return the contents of a params.json that `config_from_params` reads back as `config`."""
    raw = {key: getattr(config, ours) for key, ours in (_FIELDS | _OPTIONAL).items()}
    raw |= {"norm_eps": float(config.norm_eps), "rope_theta": float(config.rope_theta)}
    if not config.dense:
        raw["moe"] = {key: getattr(config, ours) for key, ours in _MOE.items()}
    return raw | {_EXTRAS: {name: getattr(config, name) for name in _extra_fields()}}
