"""The process of the peer: transformers' model with our weights, and our tasks done by it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from minimoe.arrays import xp_of
from minimoe.bench.measure import turn
from minimoe.bench.memory import peak_bytes, reset_peak
from minimoe.bench.models import Source
from minimoe.bench.workloads import CHECKED, Task
from minimoe.checkpoint.formats import config_to_hf, hf_name
from minimoe.config import ModelConfig
from minimoe.params import named
from minimoe.shapes import Array

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of the experts; the fastest of a task is the one reported
FEW_TOKENS = 8  # batched_mm copies the weights of every token's experts: for more it takes gigabytes, and is slow


def serve(pipe: Any, source: Source, threads: int, device: str = "cpu") -> None:
    """Answer calls until told to end."""
    if os.environ.get("OMP_WAIT_POLICY") == "passive":  # ours, inherited
        del os.environ["OMP_WAIT_POLICY"]
    try:
        theirs = Theirs(source, threads, device)
        pipe.send((False, theirs.versions))
        while (message := pipe.recv()) is not None:
            method, arguments = message
            try:
                pipe.send((False, getattr(theirs, method)(*arguments)))
            except Exception as error:
                pipe.send((True, f"{type(error).__name__}: {error}"))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send((True, f"{type(error).__name__}: {error}"))


class Theirs:
    """Their model; only ever made in the other process."""

    def __init__(self, source: Source, threads: int, device: str = "cpu") -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._torch, self._source, self._device = torch, source, torch.device("cuda" if device == "gpu" else "cpu")
        self._original = self._model = _build(source).to(self._device)
        self._task: Task | None = None
        self._cache: Any = None
        self._optimizer: Any = None

    def prepare(self, task: Task) -> str:
        """Take a task; return the name of the experts' implementation that does it fastest."""
        torch = self._torch
        self._task = task
        self._prompt, self._following = (
            torch.from_numpy(ids.astype(np.int64)).to(self._device) for ids in (task.prompt, task.following)
        )
        self._cache, self._optimizer = None, None
        self._model = self._original
        if task.what == "train":
            self._model = copy.deepcopy(self._original).train()  # the next task finds the weights as they were
            self._answer = self._loss()  # before the weights change
            self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
        if self._source.config.dense:
            return "dense"
        return self._choose()

    def _choose(self) -> str:
        assert self._task is not None
        rows = len(self._prompt) if self._task.what == "decode" else self._prompt.numel()
        times: dict[str, float] = {}
        for name in IMPLEMENTATIONS:
            if name == "batched_mm" and rows > FEW_TOKENS:
                continue
            try:
                self._model.set_experts_implementation(name)
                self.run()
                times[name] = self.run()
            except Exception:  # this version, type or machine does not have it
                continue
        if not times:
            raise RuntimeError(f"no implementation of the experts runs here: {', '.join(IMPLEMENTATIONS)}")
        best = min(times, key=lambda name: times[name])
        self._model.set_experts_implementation(best)
        return best

    def run(self) -> float:
        """Do the task once; return seconds, of one step where it is several."""
        assert self._task is not None
        if self._task.what == "train":
            return self._train()
        with self._torch.inference_mode():
            if self._task.what == "decode":
                return self._decode(self._following.shape[1])[0]
            return self._timed(self._first)[0]

    def answer(self) -> Array:
        """What our workload of the same name answers."""
        assert self._task is not None
        if self._task.what == "train":
            return np.array([[self._answer]])
        with self._torch.inference_mode():
            if self._task.what == "decode":
                logits = self._decode(min(CHECKED, self._following.shape[1]))[1]
                return self._torch.cat([one[:, -1].float() for one in logits]).cpu().numpy()
            return self._first().float().cpu().numpy()

    def peak(self) -> int:
        """Run once; return the peak of this process's memory, or on a device of what it took there."""
        if self._device.type == "cuda":
            self._torch.cuda.reset_peak_memory_stats()
            self.run()
            return int(self._torch.cuda.max_memory_allocated())
        reset_peak()
        self.run()
        return peak_bytes()

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds until the device has finished, and what the work returned."""
        start = perf_counter()
        result = work()
        if self._device.type == "cuda":
            self._torch.cuda.synchronize()
        return perf_counter() - start, result

    def rate(self, dtype: str, side: int) -> float:
        """Floating-point operations per second of torch's own matrix product."""
        torch = self._torch
        a, b = (torch.randn(side, side, device=self._device).to(getattr(torch, dtype)) for _ in range(2))
        return turn(lambda: 2 * side**3 / self._timed(lambda: torch.nn.functional.linear(a, b))[0])

    def _first(self) -> Any:
        """(B, V) logits after the prompt, which is read into a cache; (B, 1) the best tokens if they are wanted."""
        assert self._task is not None
        logits = self._model(self._prompt, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits.argmax(-1, keepdim=True) if self._task.what == "first-token" else logits

    def _decode(self, steps: int) -> tuple[float, list[Any]]:
        """Seconds of a step, and the logits of all."""
        if self._cache is None:
            self._cache = self._model(self._prompt, use_cache=True, logits_to_keep=1).past_key_values
        T = self._prompt.shape[1]
        if (more := self._cache.get_seq_length() - T) > 0:
            self._cache.crop(-more)
        seconds, logits = self._timed(
            lambda: [
                self._model(self._following[:, i : i + 1], past_key_values=self._cache, use_cache=True).logits
                for i in range(steps)
            ]
        )
        return seconds / steps, logits

    def _loss(self) -> float:
        with self._torch.no_grad():
            return float(self._model(self._prompt, labels=self._prompt, output_router_logits=False).loss)

    def _train(self) -> float:
        return self._timed(self._step)[0]

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._prompt, labels=self._prompt).loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()


def _build(source: Source) -> Any:
    """Their model with the weights of `source`, each tensor copied once; what is drawn on a device stays there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = source.config
    raw = config_to_hf(config, np.dtype(np.float32)) | {"router_aux_loss_coef": config.balance_coefficient}
    raw["output_router_logits"] = not config.dense
    theirs = AutoConfig.for_model(raw.pop("model_type"), **raw)
    dtype = getattr(torch, source.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    state = {
        name: _tensor(array) for name, array in _to_theirs(config, dict(named(source.params(stacked=False)))).items()
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if missing or unexpected:
        raise RuntimeError(f"this version names its weights otherwise: {[*missing, *unexpected][:3]}")
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its tables are no weights: off the meta device
    return model.eval()


def _tensor(array: Array) -> Any:
    import torch

    if (xp := xp_of(array)) is not np:
        array = xp.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":
            return torch.from_dlpack(array.view(xp.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _to_theirs(config: ModelConfig, arrays: dict[str, Array]) -> dict[str, Array]:
    """Their names in memory: the experts of a layer stacked, w1's rows before w3's."""
    found = {hf_name(name): array for name, array in arrays.items() if ".experts." not in name}
    found = {name.replace(".block_sparse_moe.gate.", ".mlp.gate."): array for name, array in found.items()}
    if not config.dense:
        for i in range(config.num_layers):
            experts = [f"layers.{i}.feed_forward.experts.{e}." for e in range(config.num_experts)]
            xp = xp_of(arrays[experts[0] + "w1"])
            both = [xp.concatenate([arrays[e + "w1"], arrays[e + "w3"]]) for e in experts]
            found[f"model.layers.{i}.mlp.experts.gate_up_proj"] = xp.stack(both)
            found[f"model.layers.{i}.mlp.experts.down_proj"] = xp.stack([arrays[e + "w2"] for e in experts])
    return found
