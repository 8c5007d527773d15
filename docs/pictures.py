"""
Draw the pictures of docs/routing.md: one prefill of the built-in text, and the benchmark's records.

    python docs/pictures.py            # with SmolLM2-135M-Instruct, half a minute on one core
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from kvpress_moe import MoERouterPress, load_model, plots
from kvpress_moe.cache import kept_pairs
from kvpress_moe.cache.prefill import Prefill
from kvpress_moe.report.figures.style import NORMAL, SMALL, Plot, heat_map, layer_axis, share_bar
from kvpress_moe.routers import Routing

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "pictures"
CODE = "The code of the old safe in the lighthouse is 7194."

SHOWN = ("moe_trained_global", "layer_by_layer", "kvzip_global", "adakv_keydiff", "random")


class WatchedPress(MoERouterPress):
    """Keeps the routing weights of the last prompt: layer -> (B, S, E)."""

    def route(self, call) -> Routing:
        routing = super().route(call)
        self.__dict__.setdefault("watched", {})[call.layer_idx] = routing.weights[:, 0].clone()
        return routing


def routing_weights(weights: dict[int, Tensor], names: list[str], sentence: range, words: list[str]) -> Figure:
    """Left: mean weight by layer and expert. Right: weights token by token in one sentence of one layer."""
    figure = Plot(8.6, 6.2)
    shown = 2 * len(weights) // 3
    in_sentence = weights[shown][0, sentence]
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    means = torch.stack([weight[0].mean(0) for weight in weights.values()])  # (L, E)
    norm = Normalize(0, float(max(means.max(), in_sentence.max())))
    heat_map(left, means.numpy(), norm, spec=".2f")
    layer_axis(left, list(weights))
    left.set_title("mean over the text", fontsize=NORMAL)
    image = heat_map(right, in_sentence.numpy(), norm, spec=".2f")
    right.set_yticks(range(len(words)), words, fontsize=SMALL)
    right.set_title(f"token by token, layer {shown}", fontsize=NORMAL)
    for axis in (left, right):
        axis.set_xticks(range(len(names)), names, fontsize=SMALL, rotation=30)
    share_bar(figure, image, right, "weight of the expert")
    return figure


def main(
    model_name: str | None = None,
    out: Path = OUT,
    results: Path = ROOT / "results" / "benchmark",
    methods: tuple[str, ...] | None = SHOWN,
) -> None:
    model, tokenizer = load_model(model_name)
    text = files("kvpress_moe").joinpath("data/harbour.txt").read_text(encoding="utf-8")
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True)
    prefill = Prefill(model, encoded.input_ids)

    press = WatchedPress(compression_ratio=0.75)
    kept = kept_pairs(prefill.cache, prefill.compress(press))
    names = list(press.expert_strategies.values())
    start = text.index(CODE)
    inside = [i for i, (a, b) in enumerate(encoded.offset_mapping[0].tolist()) if b > start and a < start + len(CODE)]
    words = [tokenizer.decode(encoded.input_ids[0, i]).strip() or "␣" for i in inside]

    few = MoERouterPress(0.75, experts=["keydiff", "leverage", "cur", "tova"], top_k=2, budget="uniform")
    for _ in range(4):  # the same text again and again: feedback of one call moves the next
        prefill.compress(few)
    stats = few.get_stats()

    drawn = {
        "weights": routing_weights(press.watched, names, range(inside[0], inside[-1] + 1), words),
        "usage": plots.expert_usage(stats, few.expert_strategies),
        "hit_rates": plots.hit_rates(stats, few.expert_strategies),
        "kept_positions": plots.kept_positions(kept),
        "kept_share": plots.kept_share(kept),
        "kl_over_ratio": plots.over_ratio(results, "kl", methods),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(out / f"{name}.png", dpi=110)
        print(out / f"{name}.png")


if __name__ == "__main__":
    main()
