"""Conversations with Mixtral's first Instruct models: the v1 template, and answers that stop at EOS.

    <s> [INST] question [/INST] answer</s> [INST] question [/INST] answer</s> …

`<s>` and `</s>` are the control tokens, which no text can write. `[INST]` and `[/INST]` are ordinary text in v1: each
turn is encoded by itself as the text `[INST] question [/INST]`, and so **a user who writes `[/INST]` in a question ends
it as far as the model can tell**, and may write the answer that follows. Nothing is escaped or removed here: the tokens
are exactly those of mistral-common's `MistralTokenizer.v1()`, the package of Mixtral's makers, which is the source of
every rule below.

- A conversation is a list of `{"role": "user" | "assistant" | "system", "content": text}` and ends with a question:
  not with an answer. An answer cannot be empty; a system message cannot follow an answer.
- All system messages, wherever they stand, are joined by blank lines and put before the first question, a blank line
  between them.
- Questions that follow each other directly are joined by blank lines, and so are answers; empty ones are left out. A
  system message between two questions keeps them apart.
- A conversation that begins with an answer, or is system messages only, gets an empty first question.
- White space at the ends of a text is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from minimoe import generate
from minimoe.backends import Backend
from minimoe.cache import KVCache, new_cache
from minimoe.checkpoint import MappedFiles
from minimoe.config import ModelConfig
from minimoe.generate import Uniform
from minimoe.params import Params
from minimoe.tokenizer import Tokenizer

ROLES = ("user", "assistant", "system")
Message = Mapping[str, str]
Turn = tuple[str, str]  # role and content
_BLANK_LINE = "\n\n"


class Conversation:
    """What a model has read of a conversation is kept, and the next call computes only what is new.

    That works where the next messages begin as the last ones did and go on with the answer; where its tokens come out
    differently when it is read again (it was cut off, say), only from there on. Without a match everything is computed.

    Parameters
    ----------
    ops, config, params, tokenizer : the model's
    files : checked before every step
    """

    def __init__(
        self, ops: Backend, config: ModelConfig, params: Params, tokenizer: Tokenizer, files: MappedFiles
    ) -> None:
        self._ops, self._config, self._params, self._tokenizer, self._files = ops, config, params, tokenizer, files
        self._cache: KVCache | None = None
        self._held: list[int] = []  # the tokens whose keys and values the cache holds

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Uniform | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answer the last message; return the text, or with `stream` an iterator of its pieces.

        The answer ends before EOS, or after `max_new_tokens`.

        Raises
        ------
        ChatError
            If the messages are not a conversation that the template has a form for.
        """
        ids = encode(messages, self._tokenizer)
        generate.check_settings(max_new_tokens, temperature, top_p)
        cache, held = self._taken(ids, max_new_tokens)
        steps = generate.generate_ids(
            self._ops, self._config, self._params, np.array([ids[held:]]), max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, seed=seed, cache=cache,
        )  # fmt: skip
        pieces = self._tokenizer.decode_stream(self._answer(steps, ids, cache))
        return pieces if stream else "".join(pieces)

    def _taken(self, ids: list[int], more: int) -> tuple[KVCache, int]:
        """Take the cache, or a new one, and how many of the ids it holds. It comes back when the answer has ended."""
        cache, held, needed = self._cache, self._held, len(ids) + more
        self._cache = None
        same = next((n for n, (one, other) in enumerate(zip(held, ids, strict=False)) if one != other), len(held))
        same = min(same, len(ids) - 1)  # the last token is always read: its logits are wanted
        if cache is not None and needed <= cache.max_length and cache.forget(same):
            return cache, same
        room = max(needed, min(2 * needed, self._config.max_length))  # for some turns more
        return new_cache(self._ops, self._config, self._params, 1, room), 0

    def _answer(self, steps: Iterator[Any], ids: list[int], cache: KVCache) -> Iterator[int]:
        said: list[int] = []
        try:
            for step in self._files.checked(steps):
                said.append(int(step[0]))
                if said[-1] == self._tokenizer.eos_id:
                    break
                yield said[-1]
        except GeneratorExit:  # the caller has enough
            pass
        # Not after an error or Ctrl-C: what the cache then holds is not known.
        self._cache, self._held = cache, [*ids, *said][: int(cache.lengths[0])]


class ChatError(ValueError):
    """A conversation that the template has no form for."""


def encode(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a conversation, up to where the model's answer begins.

    Raises
    ------
    ChatError
        If the messages are not a conversation that the template has a form for.
    """
    if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
        raise ChatError(f"{tokenizer.path}: has no tokens that begin and end a text, which the template needs")
    ids = [tokenizer.bos_id]
    for role, content in _joined(_checked(messages)):
        if role == "user":
            ids += tokenizer.encode(f"[INST] {content} [/INST]", bos=False)
        else:
            ids += [*tokenizer.encode(content, bos=False), tokenizer.eos_id]
    return ids


def _joined(turns: list[Turn]) -> list[Turn]:
    """Put system messages into the first question, and join what follows each other directly."""
    system = _BLANK_LINE.join(content for role, content in turns if role == "system" and content)
    joined = [
        (role, _BLANK_LINE.join(content for _, content in group if content))
        for role, group in groupby(turns, key=lambda turn: turn[0])
        if role != "system"
    ]
    if not joined or joined[0][0] == "assistant":
        joined.insert(0, ("user", ""))
    if system:
        joined[0] = ("user", system + _BLANK_LINE + joined[0][1])
    return joined


def _checked(messages: Sequence[Message]) -> list[Turn]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of dicts with a role and a content, not {_type(messages)}")
    if not messages:
        raise ChatError("messages must hold at least one message")
    turns = [_turn(n, message) for n, message in enumerate(messages)]
    for n, ((before, _), (role, _)) in enumerate(pairwise(turns), 1):
        if (before, role) == ("assistant", "system"):
            raise ChatError(f"message {n}: a system message cannot follow an answer of the assistant")
    if turns[-1][0] == "assistant":
        raise ChatError(f"message {len(turns) - 1}: the last message must be the user's, not the assistant's")
    return turns


def _turn(n: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise ChatError(f"message {n} must be a dict with a role and a content, not {_type(message)}")
    if unknown := sorted(str(key) for key in set(message) - {"role", "content"}):
        raise ChatError(f"message {n}: has {', '.join(unknown)}; a message has a role and a content only")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ChatError(f"message {n}: role must be one of {', '.join(ROLES)}, not {role!r}")
    if not isinstance(content, str):
        raise ChatError(f"message {n}: content must be a text, not {_type(content)}")
    if role == "assistant" and not content:
        raise ChatError(f"message {n}: an answer of the assistant cannot be empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ChatError(f"message {n}: content is not a text: a lone surrogate at character {error.start}") from None
    return role, content


def _type(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
