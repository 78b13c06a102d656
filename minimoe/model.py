"""The model as a user holds it: weights, config, backend and tokenizer, and what one does with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from minimoe import checkpoint, generate, mixtral
from minimoe.arrays import BFLOAT16, to_host
from minimoe.backends import Backend, make_backend
from minimoe.chat import Conversation, Message
from minimoe.checkpoint import download
from minimoe.config import ConfigError, ModelConfig
from minimoe.mixtral import KVCache
from minimoe.params import Params, map_leaves, named, quantized, stack_experts
from minimoe.params import random as random_params
from minimoe.placement import explained, placed
from minimoe.shapes import Array, Routing
from minimoe.tokenizer import Tokenizer
from minimoe.tokenizer_json import tokenizer_of
from minimoe.trace import Trace, record

BUNDLED = Path(__file__).parent / "models"
_DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bfloat16": BFLOAT16, "int8": "int8",
}  # fmt: skip


class Model:
    """A decoder with its weights.

    Made by `minimoe.load` or `minimoe.random`.

    Attributes
    ----------
    config : ModelConfig
    params : Params
        The tree of weights, on the backend's device.
    ops : Backend
        The backend, a value: `model.to(...)` returns the same weights with another.
    tokenizer : Tokenizer or None
    """

    def __init__(self, config: ModelConfig, params: Params, ops: Backend, tokenizer: Tokenizer | None = None) -> None:
        self.config, self.params, self.ops, self.tokenizer = config, params, ops, tokenizer
        self._files = checkpoint.MappedFiles(params)

    def __repr__(self) -> str:
        c = self.config
        experts = "dense" if c.dense else f"{c.num_experts} experts, top {c.num_experts_per_token}"
        return (
            f"Model({c.num_parameters():,} parameters, {c.num_active_parameters():,} active, {c.num_layers} layers, "
            f"{experts}, {self.params.storage}, backend {self.ops.name})"
        )

    def to(self, backend: str | Backend) -> Model:
        """Return a model with the same weights on another backend, bit for bit.

        Raises
        ------
        BackendError
            If there is no such backend here; DeviceMemoryError, one of them, if the device cannot hold the weights.
        """
        ops = make_backend(backend) if isinstance(backend, str) else backend
        return Model(self.config, placed(self.params, ops), ops, self.tokenizer)

    def forward(
        self,
        tokens: Any,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        mask: Any = None,
        positions: Any = None,
        routing: Routing | None = None,
        disabled_experts: Iterable[tuple[int, int]] = (),
    ) -> Float[Array, "*B T V"]:
        """Compute logits: prefill, a chunk, one decoding step or a whole batch, as the arguments say.

        Parameters
        ----------
        tokens : (B, T) or (T,) ints in [0, V)
        cache : from `new_cache`; the tokens continue what it holds, and are added to it
        last_only : only the logits of each sequence's last unmasked position
        mask : (B, T) bool, False = padding, on the left or the right
        positions : (B, T) ints; by default the unmasked tokens are counted
        routing : Routing of this call's N = B·T tokens to impose: ids, or ids and weights
        disabled_experts : (layer, expert) pairs that the gate may not choose

        Returns
        -------
        (B, T, V), or (T, V) for tokens of shape (T,); T is 1 with `last_only`. A NumPy array of float32, or float64
        for float64 weights.

        Raises
        ------
        TokenError, CacheFullError, ValueError
        """
        self._files.check()
        tokens, mask, positions, single = _batched(tokens, mask, positions)
        inputs = mixtral.check_inputs(tokens, self.config.vocab_size, mask, positions, cache)
        choose = mixtral.choices(self.ops, self.config, inputs.tokens.size, routing, disabled_experts)
        with explained(self.ops):
            logits, _ = mixtral.forward(
                self.ops, self.config, self.params, inputs, cache=cache, last_only=last_only, choose=choose
            )
            logits = to_host(logits)
        return logits[0] if single else logits

    def new_cache(self, batch: int = 1, max_length: int | None = None) -> KVCache:
        """Return an empty key/value cache for `batch` sequences of at most `max_length` tokens."""
        length = self.config.max_length if max_length is None else max_length
        return mixtral.new_cache(self.ops, self.config, self.params, batch, length)

    def generate_ids(
        self,
        tokens: Any,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        mask: Any = None,
    ) -> Int[Array, "*B n"]:
        """Continue token ids; return the new ones only, (n,) or (B, n).

        Generation ends after `max_new_tokens`, or when every sequence has produced eos_id (which is included; a
        sequence that ends early is filled up with it).
        """
        tokens, mask, _, single = _batched(tokens, mask, None)
        steps = generate.generate_ids(
            self.ops, self.config, self.params, tokens, mask=mask, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        new = list(self._files.checked(steps))
        ids = np.stack(new, axis=1) if new else np.zeros((len(tokens), 0), np.int64)  # (B, n)
        return ids[0] if single else ids

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Continue a text; return the continuation without the prompt, or with `stream` an iterator of its pieces.

        An empty prompt is BOS alone.
        """
        ids = np.array([self._tokenizer().encode(prompt)])
        steps = generate.generate_ids(
            self.ops, self.config, self.params, ids, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
        new = (int(step[0]) for step in self._files.checked(steps))
        pieces = self._tokenizer().decode_stream(new, continuing=bool(prompt))
        return pieces if stream else "".join(pieces)

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answer a conversation in the template of Mixtral's first Instruct models (see `minimoe.chat`).

        Everything is computed anew by each call; `conversation` keeps what was read before.

        Parameters
        ----------
        messages : [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …], the last by the user
        stream : return an iterator of the answer's pieces instead of its text

        Raises
        ------
        ChatError
            If the messages are not a conversation that the template has a form for.
        """
        return self.conversation().chat(messages, max_new_tokens, temperature, top_p, seed, stream)

    def conversation(self) -> Conversation:
        """Return a conversation: its `chat` is that of the model, and computes only what is new since its last call."""
        return Conversation(self.ops, self.config, self.params, self._tokenizer(), self._files)

    def trace(self, text_or_ids: str | Any, *, mask: Any = None, only: str | Iterable[str] = "*") -> Trace:
        """Run a forward pass and return its named intermediates, in execution order.

        Parameters
        ----------
        text_or_ids : a text, or token ids (T,) or (B, T)
        mask : (B, T) bool, False = padding
        only : names to keep, or patterns of them, such as `"layers.*.gating.*"`; the routing is always kept

        Raises
        ------
        TraceError
            If a pattern matches nothing, or the arrays would not fit into memory (it says how large they are).
        """
        self._files.check()
        ids = self._tokenizer().encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
        ids, mask, _, _ = _batched(ids, mask, None)
        inputs = mixtral.check_inputs(ids, self.config.vocab_size, mask)
        return record(self.ops, self.config, self.params, inputs, only=only)

    def loss_and_grads(
        self, tokens: Any, mask: Any = None, *, jitter_seed: int | None = None
    ) -> tuple[float, dict[str, Array]]:
        """Return next-token cross-entropy plus balance loss, and its gradient by every parameter's name.

        Parameters
        ----------
        tokens : (B, T) or (T,) ints
        mask : (B, T) bool; a token is a target where it and its predecessor are unmasked
        jitter_seed : draws router jitter where the config has it; None trains without
        """
        self._refuse_int8("trained")
        self._files.check()
        tokens, mask, _, _ = _batched(tokens, mask, None)
        inputs = mixtral.check_inputs(tokens, self.config.vocab_size, mask)
        rng = None if jitter_seed is None else np.random.default_rng(jitter_seed)
        with explained(self.ops):
            losses, grads, _ = mixtral.loss_and_grads(self.ops, self.config, self.params, inputs, jitter=rng)
            return float(losses.total), {name: to_host(g) for name, g in named(grads)}

    def save(self, folder: str | Path, *, layout: str = "hf") -> None:
        """Write a checkpoint folder, atomically: what was there before stays whole until the new one is.

        `layout` is "hf", which transformers reads (Grok-1 in its port's), or "fused", "mistral" or "stacked".
        """
        self._refuse_int8("saved")
        self._files.check()
        checkpoint.save(
            folder,
            self.config,
            map_leaves(self.params, to_host),
            layout=layout,
            tokenizer_file=None if self.tokenizer is None else self.tokenizer.path,
        )

    def _refuse_int8(self, what: str) -> None:
        if self.params.storage == "int8":
            raise ConfigError(f"weights in int8 cannot be {what}: load them in float32 or bfloat16")

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer (no tokenizer.model or .json in its folder): use token ids")
        return self.tokenizer


def load(
    path: str | Path = "tiny",
    *,
    backend: str = "auto",
    dtype: Any = None,
    mmap: bool = True,
    tokenizer: str | Path | None = None,
) -> Model:
    """Load a model.

    Parameters
    ----------
    path : "tiny", the bundled trained model; or a checkpoint folder, in any layout of `minimoe.checkpoint.layouts`; or
        "hf:owner/name@revision", a model on the Hugging Face Hub (see `minimoe.checkpoint.download`)
    backend : {"numpy", "numba", "cuda", "auto"}
    dtype : {None, "float32", "float64", "bfloat16", "int8"}
        None keeps weights as they are stored (float16 becomes float32). "int8" stores the matrices of linear maps and
        experts with one scale per row (see `minimoe.quantized`), and leaves the others as they are stored.
    mmap : bool
        Whether weights are used where they lie in the files, mapped into memory. False reads them into memory: for
        files that others may write to (which is noticed, but truncating one during a call ends the process).
    tokenizer : a tokenizer.model or tokenizer.json, or "v1", Mixtral-8x7B's own, from the package mistral-common
        None takes the folder's tokenizer.model, or else its tokenizer.json.

    Raises
    ------
    CheckpointError
        If the folder is not a whole and valid checkpoint; DownloadError, one of them, if it cannot be fetched.
    BackendError, ConfigError
        If there is no such backend here, or no such dtype.
    TokenizerError
        If the tokenizer's file cannot be used, or is of another model.
    """
    ops = make_backend(backend)
    folder = folder_of(path)
    kind = None if dtype is None else as_dtype(dtype)
    config, params = checkpoint.load_params(folder, dtype=None if kind == "int8" else kind, mapped=mmap)
    params = quantized(params) if kind == "int8" else params
    model = Model(config, params, ops, tokenizer_of(folder, config, tokenizer))
    return model.to(ops) if ops.xp is not np else model


def folder_of(path: str | Path) -> Path:
    """Return the folder of what `load` takes: the bundled model's, or that of a download, which is made if need be."""
    if isinstance(path, str) and path.startswith(download.PREFIX):
        return download.fetch(path)
    return BUNDLED / path if path == "tiny" else Path(path)


def random(config: ModelConfig, seed: int = 0, *, backend: str = "auto", dtype: Any = None) -> Model:
    """Return a model with fresh weights, float32 unless `dtype` says otherwise; the same seed gives the same weights.

    Raises
    ------
    ConfigError
        If the weights would not fit into the memory that is free.
    """
    ops = make_backend(backend)
    kind = as_dtype("float32" if dtype is None else dtype)
    checkpoint.check_memory(config, kind)
    params = stack_experts(random_params(config, seed, kind))
    model = Model(config, params, ops)
    return model.to(ops) if ops.xp is not np else model


def as_dtype(dtype: Any) -> Any:
    """Return the storage type called `dtype`: float32, float64, bfloat16, or the word "int8"."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in _DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)}, not {name!r}")
    return _DTYPES[name]


def _batched(tokens: Any, mask: Any, positions: Any) -> tuple[Any, Any, Any, bool]:
    """Give (T,) inputs a batch of one; the last value says whether that was done."""
    try:
        single = np.ndim(tokens) == 1
    except ValueError:
        single = False
    if not single:
        return tokens, mask, positions, False
    tokens, mask, positions = (None if x is None else np.asarray(x)[None] for x in (tokens, mask, positions))
    return tokens, mask, positions, True
