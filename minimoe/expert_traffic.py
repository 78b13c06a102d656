"""Which experts' weights a generation reads, and how well a cache of experts would do.

One call of the model (the prompt, or one new token of every sequence) *touches* in each layer the experts that any of
its tokens chose, and reads the weights of each once, however many tokens share it. Where a checkpoint is larger than
memory, what matters is how often the expert touched is one that is still there. That is counted here for caches that
drop the least recently used (LRU) expert: hits / touches, where the first touch of an expert is a miss whatever the
size of the cache.

An LRU cache of n experts holds the n touched most recently. So one stack, ordered by the time of the last touch, tells
the hits of every n at once: a touch hits if it finds its expert at a depth below n. Sources: Mattson et al., Evaluation
techniques for storage hierarchies, IBM Systems Journal 9 (1970); an LRU cache for Mixtral's experts: Eliseev and Mazur,
Fast inference of mixture-of-experts language models with offloading, arXiv 2312.17238.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from minimoe.arrays import to_host
from minimoe.params import Params, leaves
from minimoe.shapes import Array

if TYPE_CHECKING:
    from minimoe.model import Model


class Watch:
    """A model whose experts note who is sent to them: use `model`, then ask for the `traffic`.

    >>> import minimoe
    >>> watch = Watch(minimoe.load("tiny", backend="numpy"))
    >>> new = watch.model.generate_ids([1, 46, 320], max_new_tokens=5)
    >>> len(watch.traffic.ids), watch.traffic.ids[0].shape, watch.traffic.ids[1].shape
    (5, (6, 3, 2), (6, 1, 2))
    """

    def __init__(self, model: Model) -> None:
        self._calls: list[Int[Array, "L N k"]] = []
        self._layers: list[Int[Array, "N k"]] = []  # of the call that is under way
        experts = model.ops.experts

        @functools.wraps(experts.forward)
        def forward(x: Any, w1: Any, w2: Any, w3: Any, ids: Any, *rest: Any, **settings: Any) -> Any:
            self._note(w1, ids)
            return experts.forward(x, w1, w2, w3, ids, *rest, **settings)

        watched: Any = SimpleNamespace(**{**vars(experts), "forward": forward})
        self.model = model.to(dataclasses.replace(model.ops, experts=watched, graphs=False))
        self._first = self.model.params.layers[0].feed_forward.w1

    def _note(self, w1: Any, ids: Any) -> None:
        if w1 is self._first:  # also after a call that was interrupted, which does not count
            self._layers = []
        self._layers.append(np.array(to_host(ids)))
        if len(self._layers) == self.model.config.num_layers:
            self._calls.append(np.stack(self._layers))
            self._layers = []

    @property
    def traffic(self) -> Traffic:
        """All calls until now."""
        return Traffic(tuple(self._calls), *weight_bytes(self.model.params))


@dataclass(frozen=True, eq=False)
class Traffic:
    """The choices of some calls, and what follows from them. L layers, E experts, X = L·E of both.

    Attributes
    ----------
    ids : one (L, N, k) for each call, of its N tokens; -1 = not routed
    expert_bytes : (L, E) weights of each expert, as they are stored in memory or in the mapped file
    other_bytes : what every call reads besides: attention, norms, gates and head, but of the embedding table a few rows
    """

    ids: tuple[Int[Array, "L N k"], ...]
    expert_bytes: Int[Array, "L E"]
    other_bytes: int

    @cached_property
    def touched(self) -> Bool[Array, "calls L E"]:
        """Which experts each call reads."""
        L, E = self.expert_bytes.shape
        touched = np.zeros((len(self.ids), L, E + 1), bool)  # the last is what -1 means
        for call, ids in zip(touched, self.ids, strict=True):
            call[np.arange(L)[:, None], ids.reshape(L, -1)] = True
        return touched[..., :E]

    @property
    def touches(self) -> Int[Array, "L E"]:
        """In how many calls each expert was touched."""
        return np.asarray(self.touched.sum(axis=0))

    @property
    def choices(self) -> Int[Array, "L E"]:
        """How many tokens chose each expert."""
        L, E = self.expert_bytes.shape
        every = np.concatenate([np.zeros((L, 0, 1), int), *(ids.reshape(L, -1, 1) for ids in self.ids)], axis=1)
        return np.array([np.bincount(layer[layer >= 0], minlength=E) for layer in every])

    @property
    def tokens(self) -> int:
        """How many tokens went through the model."""
        return sum(int((ids[0, :, 0] >= 0).sum()) for ids in self.ids)

    @property
    def bytes(self) -> Int[Array, "L E"]:
        """How many bytes were read of each expert, by all calls."""
        return self.touches * self.expert_bytes

    @property
    def bytes_per_token(self) -> float:
        """Of all weights, experts and others; NaN without any token."""
        total = int(self.bytes.sum()) + len(self.ids) * self.other_bytes
        return total / self.tokens if self.tokens else float("nan")

    @property
    def share_touched(self) -> float:
        """Share of all experts that were touched at all."""
        return float((self.touches > 0).mean())

    def layer_caches(self) -> Cached:
        """A cache of n experts in each layer: (L, E), for n = 1 to E."""
        found = [lru(_order(self.touched[:, i]), size) for i, size in enumerate(self.expert_bytes)]
        return Cached(*(np.stack(part) for part in zip(*map(dataclasses.astuple, found), strict=True)))

    def one_cache(self) -> Cached:
        """One cache of n experts, of whatever layer: (X,), for n = 1 to L·E."""
        calls, sizes = len(self.touched), self.expert_bytes.reshape(-1)
        return lru(_order(self.touched.reshape(calls, sizes.size)), sizes)

    def by_chance(self, seed: int = 0) -> Traffic:
        """The same calls and tokens, their experts chosen anew: evenly, and independently of each other."""
        rng, E = np.random.default_rng(seed), self.expert_bytes.shape[1]
        return dataclasses.replace(self, ids=tuple(_even_choice(rng, ids, E) for ids in self.ids))

    def chance(self, draws: int = 20, seed: int = 0) -> Float[Array, " E"]:
        """Return the hit rate of all layers' caches of n = 1 to E experts by chance, the mean of some draws."""
        rates = [self.by_chance(seed + i).layer_caches().together.hit_rate for i in range(draws)]
        return np.asarray(np.mean(rates, axis=0))


@dataclass(frozen=True, eq=False)
class Cached:
    """What LRU caches of n = 1, 2, … experts would do.

    Attributes
    ----------
    touches : how many there were; one number, or (L,)
    hits : how many found their expert in the cache
    bytes_read : weights of the experts that were not there
    """

    touches: Int[Array, "*L"]
    hits: Int[Array, "*L n"]
    bytes_read: Int[Array, "*L n"]

    @property
    def hit_rate(self) -> Float[Array, "*L n"]:
        """Return hits / touches; NaN where nothing was touched."""
        touches = np.asarray(self.touches)[..., None]
        return np.divide(self.hits, touches, out=np.full(self.hits.shape, np.nan), where=touches > 0)

    @property
    def together(self) -> Cached:
        """The caches of all layers as one result: (n,)."""
        return Cached(self.touches.sum(axis=0), self.hits.sum(axis=0), self.bytes_read.sum(axis=0))


def lru(touches: Sequence[int], sizes: Int[Array, " X"]) -> Cached:
    """Serve a sequence of touches from LRU caches of n = 1 to X things.

    Parameters
    ----------
    touches : numbers in [0, X), in the order of time
    sizes : (X,) bytes of each thing

    Examples
    --------
    >>> cached = lru([0, 1, 0, 2, 2], np.array([10, 10, 10]))
    >>> cached.hit_rate.tolist(), cached.bytes_read.tolist()
    ([0.2, 0.4, 0.4], [40, 30, 30])
    """
    hits, saved = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)  # by depth
    stack: list[int] = []  # the last touched first
    for touch in touches:
        if touch in stack:
            depth = stack.index(touch)
            del stack[depth]
            hits[depth] += 1
            saved[depth] += sizes[touch]
        stack.insert(0, touch)
    total = int(np.asarray(sizes)[list(touches)].sum())
    return Cached(np.array(len(touches)), np.cumsum(hits), total - np.cumsum(saved))


def weight_bytes(params: Params) -> tuple[Int[Array, "L E"], int]:
    """Return the bytes of each expert, (L, E), and those of the other weights that every call reads whole."""
    layers = [layer.feed_forward for layer in params.layers]
    sizes = [[sum(int(w[e].nbytes) for w in (f.w1, f.w2, f.w3)) for e in range(len(f.w1))] for f in layers]
    others = sum(int(leaf.nbytes) for name, leaf in leaves(params) if _read_whole(name))
    return np.array(sizes, np.int64), others + (0 if params.output is not None else int(params.head.nbytes))


def _read_whole(name: str) -> bool:
    """Whether a leaf is neither experts (some are read) nor the embedding table (rows are)."""
    return name != "tok_embeddings" and not name.endswith((".w1", ".w2", ".w3"))


def _order(touched: Bool[Array, "calls X"]) -> list[int]:
    """What was touched, call by call; within a call in the order in which it is read, that of layers and experts."""
    found: list[int] = np.nonzero(touched)[1].tolist()
    return found


def _even_choice(rng: np.random.Generator, ids: Int[Array, "L N k"], E: int) -> Int[Array, "L N k"]:
    """Choose k of E experts anew for every token that was routed."""
    L, N, k = ids.shape
    chosen = np.argsort(rng.random((L, N, E)), axis=-1)[..., :k]
    return np.where(ids >= 0, chosen, -1)
