"""Training throughput beside transformers + autograd + torch AdamW: the same sizes, alternating in one run.

    python tests/peers/bench_training.py [--steps 10] [--rounds 3]

Prints tokens/s of both (the median of the rounds) and their ratio. Both run float32 on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
from time import perf_counter

import numpy as np

from minimoe.backends import make_backend
from minimoe.config import PRESETS, ModelConfig
from minimoe.loops import keep_freed_memory  # before torch: OpenMP reads its settings once, when it is loaded
from minimoe.training.loop import TrainConfig, batch, new_state, train_step

import torch  # isort: skip
import transformers  # isort: skip


def torch_model(config: ModelConfig) -> transformers.MixtralForCausalLM:
    """The same sizes with fresh weights; the experts' implementation is transformers' own default."""
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            num_local_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_token,
            router_aux_loss_coef=config.balance_coefficient,
            output_router_logits=True,
            sliding_window=None,
        )
    ).float()


def main() -> None:
    """Run both in turn and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", default="numba")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    keep_freed_memory()  # as `minimoe train` does
    config, train = PRESETS["tiny"], TrainConfig(steps=1000)
    streams = {"noise": np.random.default_rng(0).integers(3, config.vocab_size, 1_000_000)}
    ops = make_backend(args.backend)
    state = new_state(ops, config, train)
    model = torch_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.peak_lr, betas=(0.9, 0.95), weight_decay=0.1)

    def ours() -> None:
        train_step(ops, config, train, state, batch(streams, train, state.step + 1))

    def theirs() -> None:
        tokens = torch.from_numpy(batch(streams, train, 1))
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()

    rates: dict[str, list[float]] = {"minimoe": [], "transformers": []}
    per_step = train.batch_size * train.sequence_length
    for step in (ours, theirs):
        step(), step()  # compile, warm up
    for _ in range(args.rounds):
        for name, step in (("minimoe", ours), ("transformers", theirs)):
            start = perf_counter()
            for _ in range(args.steps):
                step()
            rates[name].append(args.steps * per_step / (perf_counter() - start))
    ratios = [a / b for a, b in zip(rates["minimoe"], rates["transformers"], strict=True)]
    medians = {name: round(float(np.median(values))) for name, values in rates.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": threads}
    print(json.dumps({"tokens_per_second": medians, "ratio": round(float(np.median(ratios)), 2), **versions}))


if __name__ == "__main__":
    main()
