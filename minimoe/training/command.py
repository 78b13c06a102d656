"""`minimoe train`: corpus, tokenizer, loop, checkpoints.

A run is a folder: `run.json` (everything that decides it), `tokenizer.model`, `manifest.json` (what the corpus was),
`state/` (float32 weights, moments and step, replaced atomically), `log.jsonl`, and at the end `model/`, a Hugging Face
folder in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from minimoe import checkpoint
from minimoe.arrays import BFLOAT16, to_host
from minimoe.backends import Backend, make_backend
from minimoe.config import PRESETS, ModelConfig, preset
from minimoe.loops import keep_freed_memory
from minimoe.params import leaves, map_leaves
from minimoe.shapes import Array
from minimoe.tokenizer import Tokenizer
from minimoe.training import corpus as corpora
from minimoe.training import tokenizer_training
from minimoe.training.loop import Metrics, TrainConfig, TrainState, batch, new_state, train_step

SMOOTHING = 0.98  # of the loss that the progress bar shows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minimoe train`."""
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS), help="sizes of the model")
    parser.add_argument("--backend", default="auto", help="numpy, numba, cuda or auto")
    parser.add_argument("--text", type=Path, nargs="+", help="train on these text files, one domain each, instead")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.model to use instead of training one")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--mixture", default=None, metavar="NAME=SHARE,…", help="share of sequences per domain")
    for field in dataclasses.fields(TrainConfig):
        if field.name == "mixture":
            continue
        required = field.default is dataclasses.MISSING
        kind = int if field.type == "int" else float
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=kind, required=required,
            default=None if required else field.default, help="" if required else f"default {field.default}",
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Carry out `minimoe train`; return the exit status."""
    ops = make_backend(args.backend)
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if f.name != "mixture"}
    train = TrainConfig(**fields, mixture=_parse_mixture(args.mixture))
    if args.save_every < 1:
        raise ValueError(f"--save-every must be at least 1, not {args.save_every}")
    started = (args.out / "state").exists()
    if started and not args.resume:
        raise ValueError(f"{args.out} holds a run already: add --resume, or choose another --out")
    if args.resume and not started:
        raise ValueError(f"{args.out} holds no run to resume")
    streams, tokenizer = _prepare(args)
    config = preset(args.preset).replace(
        vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
    )
    batch(streams, train, 1)  # domains that are too short, or missing from the mixture, are named before the run starts
    _check_same_run(
        args.out / "run.json", {"preset": args.preset, "train": dataclasses.asdict(train), "backend": ops.name}
    )
    state = new_state(ops, config, train)
    if started:
        load_state(args.out / "state", ops, state)
    keep_freed_memory()
    finished = _loop(ops, config, train, state, streams, args)
    if finished:
        stored = map_leaves(state.params, lambda w: to_host(w).astype(BFLOAT16))
        checkpoint.save(args.out / "model", config, stored, tokenizer_file=tokenizer.path)
        print(f"wrote {args.out / 'model'}")
    else:
        print(f"stopped after step {state.step}; `minimoe train --resume …` goes on")
    return 0


def _loop(
    ops: Backend,
    config: ModelConfig,
    train: TrainConfig,
    state: TrainState,
    streams: Mapping[str, Array],
    args: argparse.Namespace,
) -> bool:
    """Train to the last step, or until Ctrl-C; the state is saved either way. Return whether it is the last."""
    stop = _Interrupt()
    per_step = train.batch_size * train.sequence_length
    smooth: float | None = None
    bar = tqdm(total=train.steps, initial=state.step, unit="step", disable=None, file=sys.stderr)
    with stop, bar, (args.out / "log.jsonl").open("a") as log:
        while state.step < train.steps and not stop.asked:
            start = perf_counter()
            metrics = train_step(ops, config, train, state, batch(streams, train, state.step + 1))
            rate = per_step / (perf_counter() - start)
            smooth = metrics.loss if smooth is None else SMOOTHING * smooth + (1 - SMOOTHING) * metrics.loss
            bar.update()
            bar.set_postfix_str(_status(metrics, smooth, rate), refresh=False)
            if state.step % 10 == 0 or state.step == train.steps:
                log.write(json.dumps(dataclasses.asdict(metrics) | {"tokens_per_second": round(rate)}) + "\n")
            if state.step % args.save_every == 0:
                log.flush()
                save_state(args.out / "state", state)
    save_state(args.out / "state", state)
    return state.step == train.steps


def _status(metrics: Metrics, loss: float, rate: float) -> str:
    return (
        f"loss {loss:.3f}, {rate:,.0f} tokens/s, balance {metrics.balance:.3f}, least share {metrics.least_share:.2f}"
    )


class _Interrupt:
    """Turns the first Ctrl-C (or termination) into a request to stop after this step; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Interrupt:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def save_state(folder: Path, state: TrainState) -> None:
    """Write the state of a run, atomically: the old one stays whole until the new one is."""
    trees = {"params": state.params, "m": state.m, "v": state.v}
    tensors = {f"{key}.{name}": to_host(leaf) for key, tree in trees.items() for name, leaf in leaves(tree)}

    def write(new: Path) -> None:
        checkpoint.save_tensors(new / "state.safetensors", tensors | {"step": np.array([state.step], np.int64)})

    checkpoint.write_folder_atomically(folder, write)


def load_state(folder: Path, ops: Backend, state: TrainState) -> None:
    """Read what `save_state` wrote into a state of the same sizes."""
    tensors = checkpoint.load_tensors(folder / "state.safetensors")
    for key, tree in {"params": state.params, "m": state.m, "v": state.v}.items():
        for name, leaf in leaves(tree):
            leaf[...] = ops.asarray(tensors[f"{key}.{name}"])
    state.step = int(tensors["step"][0])


def _prepare(args: argparse.Namespace) -> tuple[dict[str, Array], Tokenizer]:
    """Collect the corpus, train or copy the tokenizer (once per run), and encode the training part."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.text:
        corpus = corpora.from_files(args.text)
    else:
        print("collecting the corpus …", file=sys.stderr)
        corpus = corpora.build()
        (args.out / "manifest.json").write_text(json.dumps(corpora.manifest(corpus), indent=1) + "\n")
    file = args.out / "tokenizer.model"
    if args.tokenizer is not None:
        Tokenizer(args.tokenizer)  # a bad file is named before anything is copied
        shutil.copyfile(args.tokenizer, file)
    elif not file.exists():
        tokenizer_training.train_tokenizer(
            tokenizer_training.sample_texts(corpus), args.out, preset(args.preset).vocab_size
        )
    tokenizer = Tokenizer(file)
    return corpora.encode(corpus, tokenizer)["train"], tokenizer


def _parse_mixture(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        shares = {name: float(share) for name, share in (item.split("=") for item in text.split(","))}
    except ValueError:
        raise ValueError(f"--mixture must read NAME=SHARE,NAME=SHARE,… and not {text!r}") from None
    if min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"--mixture needs shares of at least 0 with a positive sum, not {text!r}")
    return shares


def _check_same_run(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new run; refuse to resume one with others."""
    text = json.dumps(settings, indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        old = json.loads(path.read_text())
        flat = {**settings, **settings["train"]}
        differing = [k for k, v in {**old, **old["train"]}.items() if k != "train" and flat.get(k) != v]
        raise ValueError(f"{path} was made with other settings: {', '.join(differing)} differ")
    path.write_text(text)
