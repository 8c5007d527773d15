"""
Effect of cache feedback on a stream of prompts whose kind changes half-way: prose, then key-value lists.

    python experiments/feedback_stream.py                         untrained routers, experts "guide" and "strong"
    python experiments/feedback_stream.py --router routers/top2 --samples 8

One press with feedback and one without compress the same prompts in the same order. The prompt's question is answered
from each compressed cache, and the answer is compared with that of the full cache (KL, nats). Feedback from one prompt
has an effect from the next prompt on. Prints a table; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict

import numpy as np
import torch

from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.cache_eval import evaluate_full_cache, read
from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.cache.prefill import Prefill

STREAM = ("prose", "kv_list")


def presses(router: str | None, ratio: float) -> dict[tuple[str, str], MoERouterPress]:
    """(name of the routers or experts, "with" or "without" feedback) -> press."""
    sets = {"the eight built-in experts": {"experts": "guide"}, "strong experts": {"experts": "strong"}}
    settings = {"trained": {"router": router}} if router else {name: s for name, s in sets.items()}
    return {
        (name, mode): MoERouterPress(ratio, cache_aware=mode == "with", budget="uniform", **given)
        for name, given in settings.items()
        for mode in ("with", "without")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", help="directory of trained routers")
    parser.add_argument("--samples", type=int, default=12, help="number of prompts of each kind")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratio", type=float, default=0.75)
    args = parser.parse_args()
    model, tokenizer = load_model()

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    compared = presses(args.router, args.ratio)
    kl: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for kind in STREAM:
        for index in range(args.samples):
            prompt = encode(make_sample(kind, count_tokens, args.length, index, 0, "tune"), tokenizer)
            prefill = Prefill(model, prompt.context)
            full = evaluate_full_cache(model, prefill.compress(None), prompt).logits.log_softmax(-1)
            for (name, mode), press in compared.items():
                cache = prefill.compress(press)
                with torch.no_grad():
                    own = ask_compressed(model, cache, prompt)
                kl[name, mode, kind].append((full.exp() * (full - own)).sum(-1).mean().item())
    rows = []
    print(f"| experts | kind | KL without feedback | with | difference (95 % interval), {args.samples} prompts |")
    print("|---|---|---|---|---|")
    for name, kind in dict.fromkeys((name, kind) for name, _, kind in kl):
        without, with_feedback = np.array(kl[name, "without", kind]), np.array(kl[name, "with", kind])
        differences = with_feedback - without
        draws = np.random.default_rng(0).choice(differences, (10_000, len(differences))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        print(
            f"| {name} | {kind} | {without.mean():.3f} | {with_feedback.mean():.3f} | "
            f"{differences.mean():+.4f} [{low:+.4f}, {high:+.4f}] |"
        )
        rows.append({"experts": name, "kind": kind, "without": without.tolist(), "with": with_feedback.tolist()})
    weights = {f"{name}, {kind}": feedback(press) for (name, kind), press in compared.items() if kind == "with"}
    print(json.dumps({"seed": 0, "split": "tune", "ratio": args.ratio, "rows": rows, "logits_added": weights}))


def ask_compressed(model, cache, prompt) -> torch.Tensor:
    """Log-probabilities at the answer's tokens over a cache whose heads have equal lengths."""
    return read(model, cache, prompt, cache.get_seq_length(), offsets(prompt, cache))[0].log_softmax(-1)


def offsets(prompt, cache) -> torch.Tensor:
    """A uniform cache reports its kept pairs as its length. Positions must continue after the whole prompt."""
    return torch.tensor([prompt.context.shape[1] - cache.get_seq_length()])


def feedback(press: MoERouterPress) -> list[float]:
    """What feedback finally adds to each expert's logit: mean of the absolute values over the layers."""
    added = torch.stack([router.feedback().detach() for router in press.routers.layers])
    return [round(value, 4) for value in added.abs().mean(0).tolist()]


if __name__ == "__main__":
    main()
