"""What is timed: a prompt, a decoding step, a first token, a training step. One object each, on one backend.

`run()` does it once and returns the seconds; `answer()` gives what it computed, to be compared with another's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from jaxtyping import Int

from minimoe import mixtral
from minimoe.arrays import to_host
from minimoe.backends import Backend
from minimoe.bench.work import TRAINING, Pass, Work, experts_chosen
from minimoe.config import ModelConfig
from minimoe.generate import Decoding, generate_ids
from minimoe.params import Params, map_leaves, stack_experts
from minimoe.shapes import Array
from minimoe.training.loop import TrainConfig, TrainState, train_step

STEPS = 16  # decoding steps of one run
CHUNK = 4096  # tokens of a prompt that are read at once: what a step keeps between its ops grows with them
REFERENCE_CHUNK = 512  # by the reference, which keeps the scores of all pairs of them and the tokens before
CHECKED = 4  # of which so many are compared


@dataclass(frozen=True)
class Task:
    """What to do, on which tokens; the same for us and for a peer.

    Attributes
    ----------
    what : "prefill", "decode", "first-token" or "train"
    prompt : (B, T) token ids
    following : (B, n) the tokens that are decoded after the prompt, given beforehand
    """

    what: str
    prompt: Int[Array, "B T"]
    following: Int[Array, "B n"]


def task(what: str, config: ModelConfig, batch: int, context: int, seed: int = 0) -> Task:
    """Draw the tokens of a task.

    Raises
    ------
    ValueError
        If there is no such task, or its tokens exceed what the model was made for.
    """
    if what not in WORKLOADS:
        raise ValueError(f"--what must be of {', '.join(WORKLOADS)} and ops, not {what!r}")
    room = config.max_length - (1 if what in ("decode", "first-token") else 0)  # for the new token
    if not 1 <= context <= room:
        raise ValueError(f"{what}: --context must be between 1 and {room} tokens for this model, not {context}")
    if what == "train" and context < 2:
        raise ValueError(f"train: --context must be at least 2 (a token and its target), not {context}")
    if batch < 1:
        raise ValueError(f"--batch must be at least 1, not {batch}")
    rng = np.random.default_rng([seed, batch, context])
    n = min(STEPS, config.max_length - context)
    ids = rng.integers(0, config.vocab_size, (batch, context + n))
    return Task(what, ids[:, :context], ids[:, context:])


@dataclass(eq=False)
class Ours(ABC):
    """A model on a backend, and a task: something to time."""

    ops: Backend
    config: ModelConfig
    params: Params
    task: Task

    def __post_init__(self) -> None:  # noqa: B027 (a kind that needs no preparation has none)
        """Get ready; nothing of this is timed."""

    @property
    def tokens(self) -> int:
        """Tokens that one run gets through, as it is timed."""
        return int(self.task.prompt.size)

    @abstractmethod
    def run(self) -> float:
        """Do it once; return the seconds it took (of one step, where it is several)."""

    @abstractmethod
    def answer(self) -> Array:
        """Rows of numbers that another implementation should find, too."""

    @abstractmethod
    def work(self) -> Work:
        """Count operations and bytes of what `run` times."""

    def timed(self, function: Callable[[], Any]) -> float:
        """Seconds that a call takes, until the device has finished."""
        start = perf_counter()
        function()
        if self.ops.xp is not np:
            self.ops.xp.cuda.get_current_stream().synchronize()
        return perf_counter() - start

    def passes(self, tokens: int, held: int, routed: Any, last_only: bool = True) -> Pass:
        """Describe a forward pass of this model for counting."""
        stored, int8 = np.dtype(self.params.dtype).itemsize, self.params.storage == "int8"
        return Pass(len(self.task.prompt), tokens, held, experts_chosen(routed), stored, last_only, int8)


class Prefill(Ours):
    """Read the prompt into a new cache; logits of the last token."""

    def _forward(self) -> list[tuple[Array, Any]]:
        return read_prompt(self, mixtral.new_cache(self.ops, self.config, self.params, *self.task.prompt.shape))

    def run(self) -> float:
        """Read the prompt once."""
        return self.timed(self._forward)

    def answer(self) -> Array:
        """(B, V) logits."""
        return to_host(self._forward()[-1][0])[:, 0]

    def _passes(self) -> list[Pass]:
        sizes = [part.shape[1] for part in chunks(self.ops, self.task.prompt)]
        held = np.cumsum([0, *sizes])
        return [
            self.passes(size, int(before), routed)
            for size, before, (_, routed) in zip(sizes, held, self._forward(), strict=False)
        ]

    def first_pass(self) -> Pass:
        """Describe the pass over the prompt's first chunk."""
        return self._passes()[0]

    def work(self) -> Work:
        """Count the passes over the prompt."""
        total = Work(0, 0)
        for one in self._passes():
            total += one.work(self.config)
        return total


def chunks(ops: Backend, prompt: Int[Array, "B T"]) -> list[Int[Array, "B t"]]:
    """Split a prompt into what is read at once."""
    step = REFERENCE_CHUNK if ops.name == "numpy" else CHUNK
    return [prompt[:, i : i + step] for i in range(0, prompt.shape[1], step)]


def read_prompt(workload: Ours, cache: mixtral.KVCache) -> list[tuple[Array, Any]]:
    """Read the prompt into a cache; return logits of the last token and routing of each chunk."""
    ops, config, params, found = workload.ops, workload.config, workload.params, []
    for part in chunks(ops, workload.task.prompt):
        inputs = mixtral.check_inputs(part, config.vocab_size, cache=cache)
        found.append(mixtral.forward(ops, config, params, inputs, cache=cache, last_only=True))
    return found


class Decode(Ours):
    """One token after the other, with the prompt in the cache; the tokens are given, so nothing is sampled.

    It goes as generation does: on a device one graph is replayed, on a CPU a step is one compiled call.
    """

    def __post_init__(self) -> None:
        (B, T), n = self.task.prompt.shape, self.task.following.shape[1]
        self._cache = mixtral.new_cache(self.ops, self.config, self.params, B, T + n)
        self._fill()
        self._decoding = Decoding(self.ops, self.config, self.params, self._cache)
        if self._cache.positions.shape[1] < T + n:
            raise ValueError(f"decode: prompt and new tokens, {T + n}, exceed the sliding window: lower --context")

    def _fill(self) -> None:
        """Put the prompt into the cache."""
        read_prompt(self, self._cache)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return len(self.task.prompt)

    def _rewind(self) -> None:
        """Forget the tokens after the prompt."""
        self._decoding.go_back(self.task.prompt.shape[1])

    def _step(self, i: int) -> tuple[Array, Any]:
        token = self.task.following[:, i : i + 1]
        inputs = mixtral.check_inputs(token, self.config.vocab_size, cache=self._cache)
        return mixtral.forward(self.ops, self.config, self.params, inputs, cache=self._cache)

    def _follow(self, i: int) -> Array:
        """(B, V) logits of one step."""
        if self.ops.graphs:
            return self._decoding.logits(self.task.following[:, i])
        return self._step(i)[0][:, 0]  # op by op, for whoever times them

    def run(self) -> float:
        """Decode all tokens; return the seconds of one step."""
        self._rewind()
        n: int = self.task.following.shape[1]
        return self.timed(lambda: [self._follow(i) for i in range(n)]) / n

    def answer(self) -> Array:
        """(CHECKED · B, V) logits of the first steps."""
        self._rewind()
        steps = min(CHECKED, self.task.following.shape[1])
        return np.concatenate([to_host(self._follow(i)) for i in range(steps)])

    def first_pass(self) -> Pass:
        """Describe the first step."""
        self._rewind()
        return self.passes(1, self.task.prompt.shape[1], self._step(0)[1])

    def work(self) -> Work:
        """Count all steps; return the mean of one."""
        self._rewind()
        T, n = self.task.prompt.shape[1], int(self.task.following.shape[1])
        total = Work(0, 0)
        for i in range(n):
            total += self.passes(1, T + i, self._step(i)[1]).work(self.config)
        return total * (1 / n)


class FirstToken(Prefill):
    """From token ids to the first new one: cache, prompt, choice."""

    def _first(self) -> Array:
        return next(generate_ids(self.ops, self.config, self.params, self.task.prompt, max_new_tokens=1))

    def run(self) -> float:
        """Generate one token."""
        return self.timed(self._first)

    def answer(self) -> Array:
        """(B, 1) the tokens."""
        return self._first()[:, None]


class Train(Ours):
    """One step of AdamW on the cross-entropy and balance loss of the prompt, with state of its own."""

    def __post_init__(self) -> None:
        B, T = self.task.prompt.shape
        self._settings = TrainConfig(steps=1000, batch_size=B, sequence_length=T)
        xp = self.ops.xp
        weights = stack_experts(map_leaves(self.params, lambda w: w.astype(np.float32)))
        self._state = TrainState(weights, map_leaves(weights, xp.zeros_like), map_leaves(weights, xp.zeros_like))

    def _step(self) -> float:
        return train_step(self.ops, self.config, self._settings, self._state, self.task.prompt).loss

    def run(self) -> float:
        """Take one step."""
        return self.timed(self._step)

    def answer(self) -> Array:
        """(1, 1) cross-entropy before the first step; to be asked before `run`."""
        return np.array([[self._step()]])

    def work(self) -> Work:
        """Count a forward pass three times: its backward is twice as many products."""
        inputs = mixtral.check_inputs(self.task.prompt, self.config.vocab_size)
        _, routed = mixtral.forward(self.ops, self.config, self._state.params, inputs, last_only=True)
        return self.passes(inputs.tokens.shape[1], 0, routed, last_only=False).work(self.config) * TRAINING


WORKLOADS: dict[str, type[Ours]] = {
    "prefill": Prefill, "decode": Decode, "first-token": FirstToken, "train": Train,
}  # fmt: skip


def distance(ours: Array, theirs: Array) -> float:
    """Root mean square of the difference over that of the truth, row by row; the median row.

    A near tie in one router may send one token to another expert in one of two implementations; that is no mistake,
    and concerns a row.

    >>> distance(np.array([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0]]), np.array([[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]))
    0.0
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    errors = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    return float(np.median(errors))
