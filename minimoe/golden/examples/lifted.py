"""transformers in true float64.

Its modelling code computes norms, softmax, rotary angles and losses in float32 whatever the type of the model. Under
`lifted()` whatever asks torch for float32 gets float64 instead: no file or class of theirs is changed, and a result in
float32 is an error, so that no cast can hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _Lift(TorchFunctionMode):  # type: ignore[misc] # torch is Any to mypy
    """Hand float64 to whoever asks for float32."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        result = func(*args, **kwargs)
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                raise AssertionError(f"{func} computed in float32")
        return result


@contextmanager
def lifted() -> Iterator[None]:
    """Within it torch computes in float64 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Lift():
            yield
    finally:
        torch.set_default_dtype(before)
