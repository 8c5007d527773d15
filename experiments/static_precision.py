"""
Does the choice of a strategy by pair earn its keep? A static precision of every head, trained alike, as the baseline.

    python -m experiments.static_precision --router routers/mine --shards runs/shards --out runs/static

For each share of the bytes, every KV head of every layer gets one precision for all pairs that it keeps. This precision
and a bonus of each head on its scores are trained end to end, with the loss, the prompts, the temperatures and the
optimiser of `kvpress-moe train`. The scores are those of the trained routers and do not change. Then the test split is
answered at each share, with these precisions and with the routers' own choice for every pair, from one prefill. Prints
a table; the last line is one JSON document. About 10 minutes for each share with SmolLM2 on one core.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.router_variants import interval
from kvpress_moe import MoERouterPress, load_model
from kvpress_moe.benchmark.byte_strategies import ELEMENT_SIZE, Coded
from kvpress_moe.benchmark.cache_eval import evaluate_caches, evaluate_full_cache
from kvpress_moe.benchmark.methods import Method
from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.benchmark.selections import Kept
from kvpress_moe.benchmark.shared_prefill import select_pairs
from kvpress_moe.benchmark.tasks import CORE, make_sample
from kvpress_moe.budget.shared_bytes import decide_strategies
from kvpress_moe.codes.precision import menu_of
from kvpress_moe.press.packing import Menu
from kvpress_moe.routers.checkpoint import load_routers
from kvpress_moe.training.coded_pairs import CodedPairs, layer_basis
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.end_to_end import MIN_SHARE, RECENT, SINKS, EndToEnd
from kvpress_moe.training.shards import Shards
from kvpress_moe.training.trainer import made_prompts
from kvpress_moe.training.tuning_samples import TuningSample, reader


class StaticPrecision(EndToEnd):
    """The tuning of one precision for each head, instead of the routers'."""

    def __init__(self, *args, share: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.byte_shares = (share, share)
        self.coded_share = 1.0
        n_heads = self.routers.config.num_heads
        self.choice = nn.Parameter(torch.zeros(len(self.precisions), len(self.layers), n_heads))
        self.bonus = nn.Parameter(torch.zeros(len(self.layers), n_heads))
        self.parameters = [self.choice, self.bonus]
        self.optimizer = torch.optim.Adam([{"params": self.parameters, "scale": 30.0}], self.learning_rate, (0.9, 0.98))

    def judge(self, captured):
        with torch.no_grad():
            return super().judge(captured)

    def code_softly(self, cache, scores, worths, power, share, temperature):
        n_tokens, coded = scores.shape[2], []
        for number, layer_idx in enumerate(self.layers):
            keys, values = cache[layer_idx]
            basis = layer_basis(self.model, layer_idx, self.routers.key_transforms, n_tokens)
            menu = Menu.of(self.precisions, keys.shape[-1], ELEMENT_SIZE, basis)
            scaling = self.model.model.layers[layer_idx].self_attn.scaling
            coded.append(CodedPairs.of(keys, values, menu.precisions, scaling, power[number], basis))
        of_menu = (self.choice / temperature).log_softmax(0)  # (M, L, H)
        nbytes = menu.nbytes[1:, None, None]
        mean_bytes = (of_menu.exp() * nbytes).sum(0)[..., None]  # (L, H, 1)
        worth = self.powers() * scores + self.bonus[..., None] - mean_bytes.log()
        whole = menu.whole(menu.budget(n_tokens, share))  # first tokens that stay as the model wrote them, as always
        always = torch.zeros(n_tokens, dtype=torch.bool)
        always[:SINKS] = always[-RECENT:] = True

        def stays(log_price: Tensor | float) -> Tensor:
            return F.logsigmoid((worth - log_price) / temperature).masked_fill(always, 0.0)

        budget = menu.budget(n_tokens, share) * scores[..., 0].numel()
        low, high = -60.0, 60.0
        for _ in range(40):
            middle = (low + high) / 2
            spent = float((stays(middle).exp() * mean_bytes).detach().sum())
            low, high = (middle, high) if spent > budget else (low, middle)
        at = stays(high).detach().exp()
        slope = -(at * (1 - at) * mean_bytes.detach()).sum() / temperature
        spent = (stays(high).exp() * mean_bytes).sum()
        log_kept = stays(high - (spent - spent.detach()) / slope)
        pairs = list(cache)
        for number, (layer_idx, layer) in enumerate(zip(self.layers, coded, strict=True)):
            probs = torch.cat((torch.zeros_like(of_menu[:1]), of_menu))[:, number, :, None].expand(-1, -1, n_tokens)
            probs = probs.masked_fill(torch.arange(n_tokens) < whole, -torch.inf)
            probs[-1, :, :whole] = 0.0
            pairs[layer_idx] = layer.mixed(*cache[layer_idx], probs, menu.precisions)
        return pairs, log_kept, torch.zeros(())

    def powers(self) -> Tensor:
        """The routers' power of the score, by layer: (L, 1, 1)."""
        return torch.stack([self.routers.layers[i].rule.powers[0].detach() for i in self.layers])[:, None, None]

    def strategies(self, scores: Tensor, menu: Menu, share: float) -> list[Tensor]:
        """The strategy of every pair of a prompt, (H, S) by layer, with the trained precisions."""
        n_tokens = scores.shape[2]
        costs = torch.full((len(menu.nbytes), *scores.shape), torch.inf)
        costs[0] = (self.powers() * scores + self.bonus.detach()[..., None]).exp()
        costs.scatter_(0, self.choice.argmax(0)[None, ..., None].expand(1, -1, -1, n_tokens) + 1, 0.0)
        costs[0, ..., :SINKS] = costs[0, ..., -RECENT:] = torch.inf
        allowed = menu.plan(n_tokens, share, MIN_SHARE * share * n_tokens)
        costs[-1, ..., : allowed.whole] = 0.0
        flat = costs.flatten(1, 2)[:, None].bfloat16()
        chosen = decide_strategies(flat, menu.nbytes, allowed, False)[0]
        return list(chosen.unflatten(0, scores.shape[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--router", type=Path, required=True, help="directory of trained routers")
    parser.add_argument("--shards", type=Path, required=True, help="what `train --shards` captured")
    parser.add_argument("--out", type=Path, required=True, help="directory for the state of the tuning")
    parser.add_argument("--model", help="hub id or directory; default: SmolLM2-135M-Instruct")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.1, 0.0625, 0.05])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5, help="of each task, test split")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model)
    routers = load_routers(arguments.router)
    if not routers.config.strategies:
        parser.error(f"--router: {arguments.router} was not trained to choose strategies")
    card = json.loads((arguments.router / "routers.json").read_text())
    recipe = {name: tuple(v) if isinstance(v, list) else v for name, v in card["metrics"]["recipe"].items()}
    config = TrainingConfig(**recipe)
    shards = Shards(arguments.shards)
    made = made_prompts(model, tokenizer, config, arguments.shards)
    samples = [TuningSample(prompt, shards.path(name)) for name, prompt in made]
    menu = menu_of("mixed", bool(routers.key_transforms))
    tuned = {}
    for share in arguments.shares:
        tuner = StaticPrecision(
            model,
            tokenizer,
            routers,
            samples,
            reader(config, config.heuristics),
            top_k=config.top_k,
            learned=config.experts.index("learned"),
            menu=menu,
            coded_share=1.0,
            train_gate=True,
            aux_loss_weight=0.0,
            replay_weight=config.replay_weight,
            epochs=arguments.epochs,
            learning_rate=config.end_to_end_rate,
            seed=config.seed,
            share=share,
        )
        states = arguments.out / f"{share:g}"
        states.mkdir(parents=True, exist_ok=True)

        def progress(done: int, total: int, loss: float, share: float = share) -> None:
            print(f"{share:g} of the bytes: {done}/{total} {loss:.4f}", end="\r", flush=True)

        tuner.run(states, progress)
        tuned[share] = tuner
    kl: dict[tuple[str, float], list[float]] = defaultdict(list)

    def routed_press(protect):  # a new one each time: the benchmark remembers the scores of a press
        return MoERouterPress(router=routers, precision="mixed", cache_aware=False)

    method = Method("routed", "ours", routed_press, "global", "routed", precision="own")
    for index in range(arguments.samples):
        for task in CORE:
            sample = make_sample(
                task, lambda text: len(tokenizer(text, add_special_tokens=False).input_ids), 1024, index
            )
            prompt = encode(sample, tokenizer)
            cells = [("routed", 1 - share) for share in arguments.shares]
            scores: list[Tensor] = []
            taken, mix = [], MoERouterPress.mix

            def noted(self, call, routing, scores=scores, mix=mix):
                scores.append(mix(self, call, routing)[0])
                return scores[-1][None]

            MoERouterPress.mix = noted
            try:
                selections = select_pairs(model, prompt.context, {"routed": method}, cells, SINKS, RECENT)
            finally:
                MoERouterPress.mix = mix
            reference = evaluate_full_cache(model, selections.cache, prompt)
            kept = [selections.kept[cell] for cell in cells]
            for share, routed in zip(arguments.shares, list(kept), strict=True):
                coded = routed.coded
                chosen = tuned[share].strategies(torch.stack(scores), coded.menu, share)
                static = Coded(chosen, coded.menu, coded.bases)
                taken.append(Kept([layer > 0 for layer in chosen], None, routed.next_position, coded=static))
            answers = evaluate_caches(model, selections, prompt, reference, [*kept, *taken])
            for number, share in enumerate(arguments.shares):
                kl["routed", share].append(answers[number].kl)
                kl["static", share].append(answers[len(kept) + number].kl)
    print("\n| share of the bytes | a strategy by pair | a precision by head | difference, 95 % |\n|---|---|---|---|")
    figures = {"samples": arguments.samples * len(CORE), "router": str(arguments.router), "shares": {}}
    for share in arguments.shares:
        routed, static = torch.tensor(kl["routed", share]), torch.tensor(kl["static", share])
        low, high = interval((routed - static).tolist())
        print(f"| {share:.4g} | {routed.mean():.4f} | {static.mean():.4f} | {low:.4f} to {high:.4f} |")
        figures["shares"][f"{share:g}"] = {
            "routed": routed.mean().item(),
            "static": static.mean().item(),
            "interval": [low, high],
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
