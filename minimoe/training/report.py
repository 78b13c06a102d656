"""What became of a training run: held-out loss per domain beside n-gram models, expert balance, and what routing knows.

    python -m minimoe.training.report RUN [--model FOLDER] [--out FOLDER]

writes `report.json` and the tables of the model card. The n-gram models (interpolated Kneser-Ney, orders 1 to 3) see
the same tokens as the model did: once all domains together, as the model, and once the domain at hand alone, which
tells them what the model has to find out for itself. The model is compared with the best of the six.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimoe import checkpoint, reading
from minimoe.backends import make_backend
from minimoe.routing_statistics import domain_information, shares, shuffled_information
from minimoe.shapes import Array
from minimoe.tokenizer import Tokenizer
from minimoe.training import corpus as corpora
from minimoe.training import ngrams

ORDERS = (1, 2, 3)
UNIT = 64  # consecutive tokens that are dealt out together when domains are shuffled
MARGIN = 0.15  # nats per token that the model is to be better than the best n-gram model


def report(folder: Path, encoded: Mapping[str, Mapping[str, Array]], backend: str = "auto") -> dict[str, Any]:
    """Measure a model on the held-out part of a corpus, as `corpus.encode` returned it.

    Returns
    -------
    dict
        JSON-able: `domains` {name: losses in nats per token}, `shares` (L, E), `least_share` (times E), and per layer
        `information`, `shuffled_mean`, `shuffled_max` in bits.
    """
    config, params = checkpoint.load_params(folder)
    ops = make_backend(backend)
    train, held_out = encoded["train"], encoded["held_out"]
    together = ngrams.fit(list(train.values()), config.vocab_size)
    domains, all_ids, labels, units = {}, [], [], []
    for number, (name, tokens) in enumerate(held_out.items()):
        alone = ngrams.fit([train[name]], config.vocab_size)
        rivals = {
            "all_domains": [together.loss(tokens, order) for order in ORDERS],
            "own_domain": [alone.loss(tokens, order) for order in ORDERS],
        }
        result = reading.read_tokens(ops, config, params, tokens.astype(np.int64), name=name)
        loss = float(result.losses[result.tokens != config.bos_id].mean())  # as the n-gram models count
        best = min(min(losses) for losses in rivals.values())
        domains[name] = {"tokens": int(tokens.size), "loss": loss, **rivals, "best": best, "margin": best - loss}
        assert result.ids is not None
        all_ids.append(result.ids)
        labels.append(np.full(result.tokens.size, number))
        units.append(np.arange(result.tokens.size) // UNIT + (number << 32))
    ids, label = np.concatenate(all_ids, axis=1), np.concatenate(labels)
    shuffled = shuffled_information(ids, label, np.concatenate(units), shuffles=20)
    share = shares(ids, config.num_experts)
    return {
        "domains": domains,
        "shares": share.tolist(),
        "least_share": float(share.min() * config.num_experts),
        "information": domain_information(ids, label).tolist(),
        "shuffled_mean": shuffled.mean(axis=0).tolist(),
        "shuffled_max": shuffled.max(axis=0).tolist(),
    }


def tables(result: dict[str, Any]) -> str:
    """Return the report as Markdown tables."""
    lines = [
        "| domain | held-out tokens | model | unigram | bigram | trigram | the same, own domain only | better by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, d in result["domains"].items():
        grams = " | ".join(f"{loss:.3f}" for loss in d["all_domains"])
        own = " / ".join(f"{loss:.3f}" for loss in d["own_domain"])
        lines.append(f"| {name} | {d['tokens']:,} | **{d['loss']:.3f}** | {grams} | {own} | {d['margin']:.3f} |")
    experts = range(len(result["shares"][0]))
    lines += [
        "",
        "| layer | "
        + " | ".join(f"expert {e}" for e in experts)
        + " | bits about the domain | shuffled: mean, largest |",
        "| --- |" + " ---: |" * (len(experts) + 2),
    ]
    for i, row in enumerate(result["shares"]):
        cells = " | ".join(f"{100 * share:.1f}%" for share in row)
        chance = f"{result['shuffled_mean'][i]:.4f}, {result['shuffled_max'][i]:.4f}"
        lines.append(f"| {i} | {cells} | **{result['information'][i]:.3f}** | {chance} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rebuild the corpus, measure, and write report.json and report.md."""
    parser = argparse.ArgumentParser(description="held-out losses, balance and routing of a training run")
    parser.add_argument("run", type=Path, help="the folder that `minimoe train` wrote")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    encoded = corpora.encode(corpora.build(), Tokenizer(args.run / "tokenizer.model"))
    result = report(args.run / "model", encoded, args.backend)
    (args.run / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.run / "report.md").write_text(tables(result))
    print(tables(result))


if __name__ == "__main__":
    main()
