"""The course's two experiments, each a few small models trained on the same tokens in the same order.

    python -m minimoe.training.experiments balance --out notebooks/data
    python -m minimoe.training.experiments sparsity --out notebooks/data

`balance` trains the tiny preset without a balance loss, with the concatenated one and with the one per layer: the
second is even on paper, summed over the layers, while single layers need not be. It does so from two starts: ours
(`params.random`) with Mixtral's coefficient 0.02, and a flat one (every matrix with standard deviation 0.02, which is
transformers' default) with coefficient 0.01. `sparsity` holds the work of a token constant, k · F of the experts'
hidden width, and asks what more experts (E) and a finer choice (k) buy beside a dense model of the same active
parameters. Curves are written as JSON, together with everything that decided them; with `--variants` only these are
trained anew, and the others stay as the file has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from minimoe import mixtral
from minimoe.arrays import to_host
from minimoe.backends import Backend, make_backend
from minimoe.config import PRESETS, ModelConfig
from minimoe.loops import keep_freed_memory
from minimoe.params import Params, map_leaves
from minimoe.routing_statistics import shares
from minimoe.shapes import Array
from minimoe.tokenizer import Tokenizer
from minimoe.training import corpus
from minimoe.training.loop import TrainConfig, batch, new_state, train_step

TOKENIZER = Path(__file__).parent.parent / "models" / "tiny" / "tokenizer.model"
WIDTH = 320  # k · F, the hidden width that a token meets in every model of `sparsity`
LOGGED, MEASURED = 10, 50  # steps between two training losses, and between two looks at the held-out part
WINDOWS = 8  # of each domain's held-out part
FLAT, FLAT_COEFFICIENT = 0.02, 0.01  # standard deviation of the flat start, and its balance loss's coefficient


def variants(experiment: str) -> dict[str, ModelConfig]:
    """Return the models of an experiment by name; those called `flat_…` start from `flat_start`."""
    tiny = PRESETS["tiny"]
    if experiment == "balance":
        found = {}
        for start, coefficient in (("", tiny.balance_coefficient), ("flat_", FLAT_COEFFICIENT)):
            found[f"{start}off"] = tiny.replace(balance_coefficient=0.0)
            for form in ("concatenated", "per_layer"):
                found[start + form] = tiny.replace(balance_form=form, balance_coefficient=coefficient)
        return found
    dense = tiny.replace(num_experts=1, num_experts_per_token=1, dense=True, intermediate_size=WIDTH)
    sparse = {
        f"E={E} k={k}": tiny.replace(num_experts=E, num_experts_per_token=k, intermediate_size=WIDTH // k)
        for E, k in ((2, 2), (4, 2), (8, 2), (16, 2), (8, 1), (8, 4))
    }
    return {"dense": dense, **sparse}


def flat_start(params: Params, seed: int) -> Params:
    """Return matrices drawn with standard deviation 0.02, embeddings too, and the norms as they are."""
    rng = np.random.default_rng(seed)
    return map_leaves(
        params, lambda w: w if w.ndim == 1 else (FLAT * rng.standard_normal(w.shape, np.float32)).astype(w.dtype)
    )


def run_variant(
    ops: Backend,
    config: ModelConfig,
    train: TrainConfig,
    streams: Mapping[str, Int[Array, " n"]],
    held_out: Mapping[str, Int[Array, "windows T"]],
    flat: bool = False,
) -> dict[str, Any]:
    """Train one model from our start, or from the flat one; return its curves.

    Returns
    -------
    dict
        JSON-able: `parameters`, `active`, `steps` and `loss` (training, mean of the last `LOGGED` steps), `measured`
        (steps), `held_out` {domain: losses in nats per token}, `balance` (the loss per layer, k is even), and `shares`
        (measured, L, E) of assignments on the held-out part; the last two are empty for a dense model.
    """
    state = new_state(ops, config, train)
    if flat:
        state.params = map_leaves(flat_start(map_leaves(state.params, to_host), train.seed), ops.asarray)
    found: dict[str, Any] = {
        "parameters": config.num_parameters(), "active": config.num_active_parameters(), "steps": [], "loss": [],
        "measured": [], "held_out": {name: [] for name in held_out}, "balance": [], "shares": [],
    }  # fmt: skip
    recent: list[float] = []
    for _ in tqdm(range(train.steps), unit="step", leave=False, file=sys.stderr):
        recent.append(train_step(ops, config, train, state, batch(streams, train, state.step + 1)).loss)
        if state.step % LOGGED == 0:
            found["steps"].append(state.step)
            found["loss"].append(round(float(np.mean(recent)), 4))
            recent.clear()
        if state.step % MEASURED == 0 or state.step == train.steps:
            found["measured"].append(state.step)
            _measure(ops, config, state.params, held_out, found)
    return found


def _measure(
    ops: Backend, config: ModelConfig, params: Params, held_out: Mapping[str, Array], found: dict[str, Any]
) -> None:
    """Add losses and routing on the held-out windows to the curves."""
    ids, logits = [], []
    for name, windows in held_out.items():
        inputs = mixtral.check_inputs(windows, config.vocab_size)
        scores, routed = mixtral.forward(ops, config, params, inputs)
        targets = ops.asarray(mixtral.next_tokens(inputs))
        loss, _, _ = ops.cross_entropy.forward(scores.reshape(targets.size, -1), targets.reshape(-1))
        found["held_out"][name].append(round(float(loss), 4))
        routing = mixtral.collect_routing(ops, routed)
        if routing is not None:
            ids.append(to_host(routing.ids))
            logits.append(to_host(routing.logits))
    if ids:
        chosen, scores = np.concatenate(ids, axis=1), np.concatenate(logits, axis=1)
        balance = ops.balance_loss.forward(ops.asarray(scores), ops.asarray(chosen), None, "per_layer")
        found["balance"].append(round(float(balance), 4))
        found["shares"].append(np.round(shares(chosen, config.num_experts), 4).tolist())


def main(argv: list[str] | None = None) -> None:
    """Run one experiment and write its curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("balance", "sparsity"))
    parser.add_argument("--steps", type=int, default=600, help="of 4,096 tokens each (default 600)")
    parser.add_argument("--out", type=Path, default=Path("notebooks/data"), help="folder of the JSON file")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="train only these anew")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args(argv)
    chosen = variants(args.experiment)
    if args.variants is not None:
        if unknown := [name for name in args.variants if name not in chosen]:
            parser.error(f"no variant {unknown[0]!r}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in args.variants}
    ops = make_backend(args.backend)
    train = TrainConfig(steps=args.steps)
    tokenizer = Tokenizer(TOKENIZER)
    print("collecting the corpus …", file=sys.stderr)
    encoded = corpus.encode(corpus.build(), tokenizer)
    T = train.sequence_length
    held_out = {
        name: tokens[: WINDOWS * T].astype(np.int64).reshape(WINDOWS, T) for name, tokens in encoded["held_out"].items()
    }
    keep_freed_memory()
    command = f"python -m minimoe.training.experiments {args.experiment} --steps {args.steps}"
    path = args.out / f"{args.experiment}.json"
    curves = {} if args.variants is None else _kept(path, command)
    for name, config in chosen.items():
        config = config.replace(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
        print(f"{name}: {config.num_parameters():,} parameters", file=sys.stderr)
        flat = name.startswith("flat_")
        curves[name] = run_variant(ops, config, train, encoded["train"], held_out, flat)
    tokens = args.steps * train.batch_size * T
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, "tokens": tokens, "variants": curves}) + "\n")
    print(f"wrote {path}")


def _kept(path: Path, command: str) -> dict[str, Any]:
    """The curves that a file has already, made by the same command."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["command"] != command:
        raise SystemExit(f"{path}: was made by another command, {found['command']!r}: train all variants")
    kept: dict[str, Any] = found["variants"]
    return kept


if __name__ == "__main__":
    main()
