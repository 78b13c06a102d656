"""How Numba compiles our loops: with copies of what they call that are their own.

A function is compiled by itself and once more in each that calls it, and is optimised each time anew. Where the choice
is LLVM's (which product of a sum to fuse, whether to divide or to multiply by a reciprocal) the copies round
differently. All have one name, and a process would run, for all callers, the copy that it has loaded first: the one
compiled by itself where it has just compiled, any other where loops come from the cache. So the last bits of a sum
would depend on what the process has done before. Here the copies are internal, as a C compiler's `static` functions
are: each loop runs what was compiled with it, and the bits are those of the file in the cache.
"""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class OwnCopies(Compiler):  # type: ignore[misc] # Numba has no types
    """Numba's compiler, for `numba.njit(pipeline_class=OwnCopies)`: no caller's copy of a function serves another."""

    def define_pipelines(self) -> list[Any]:
        state = self.state
        if state.library is None:
            state.library = _Library(state.targetctx.codegen(), state.func_id.func_qualname)
            state.library.enable_object_caching()
        return list(super().define_pipelines())


class _Library(JITCodeLibrary):  # type: ignore[misc] # Numba has no types
    """The code of one compiled function and its copies of what it calls."""

    def _finalize_final_module(self) -> None:
        """Numba's last step, which makes machine code; afterwards callers may have the copies under their names."""
        functions = [function for function in self._final_module.functions if not function.is_declaration]
        copies = [function for function in functions if function.linkage.name == "linkonce_odr"]
        for function in copies:
            function.linkage = "internal"
        super()._finalize_final_module()
        for function in copies:
            function.linkage = "linkonce_odr"
