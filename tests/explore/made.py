"""Small things to explore: trained-like routers, a text, and a record as large as a long prompt's."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.budget.shared_bytes import strategy_costs
from kvpress_moe.budget.switch_prices import switch_prices
from kvpress_moe.codes.precision import MIXED
from kvpress_moe.explore import PrefilledText, prefill_text
from kvpress_moe.explore.payload import payload
from kvpress_moe.explore.recording_press import LayerRecord, Strategies
from kvpress_moe.press.packing import Menu
from kvpress_moe.routers import RouterConfig, Routers

TEXT = "The crane lifts twelve tons. A cutter went aground in the fog.\n" * 6
QUESTIONS = ["What does the crane lift?"]


def still(*args, **kwargs) -> None:
    """A progress bar that shows nothing."""


def reading(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = TEXT) -> PrefilledText:
    return prefill_text(model, tokenizer, text, QUESTIONS, 8, still)


def calibrated_routers(model: PreTrainedModel, top_k: int = 3) -> Routers:
    """As trained ones are, with weights drawn at random: experts and heads differ in every term."""
    sizes = {"num_layers": model.config.num_hidden_layers, "hidden_size": model.config.hidden_size}
    experts = ("learned", "knorm", "tova")
    more = {"num_heads": 2, "learned": 8, "learned_sees": True, "top_k": top_k, "reach": 16}
    routers = Routers(RouterConfig("pikv", experts, **sizes, trained=True, **more))
    generator = torch.Generator().manual_seed(1)
    for parameter in routers.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return routers


def drawn_strategies(log_weights: torch.Tensor) -> Strategies:
    """Strategies of pairs whose losses fall by a factor of 4 with every bit."""
    menu = Menu.of(MIXED, 64, 2, None)
    losses = torch.tensor([4.0 ** -(p.key_bits + p.value_bits) for p in menu.precisions]).clamp(min=1e-9)
    costs = strategy_costs(log_weights, losses[:, None, None].expand(-1, *log_weights.shape))
    prices = switch_prices(costs, menu.nbytes)
    return Strategies(menu, torch.zeros(log_weights.shape, dtype=torch.uint8), prices)


def synthetic(n_layers: int, n_heads: int, n_tokens: int, n_experts: int = 5, precise: bool = False) -> dict:
    """A page's data of any size, drawn at random; with ``precise`` also the strategies of pairs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    records = {
        layer: LayerRecord(
            weights=draw(n_tokens, n_experts).softmax(-1),
            scores=draw(n_heads, n_tokens) + layer / 10,
            moves=draw(n_heads, n_experts, n_tokens),
            mass=draw(n_heads, n_tokens).exp(),
            strategies=drawn_strategies(draw(n_heads, n_tokens) + layer / 10) if precise else None,
        )
        for layer in range(n_layers)
    }
    words = ["The", " crane", " lifts", " twelve", " tons", " of", " sand", " in", " the", " fog", ".", " It"]
    tokens = [words[position % len(words)] if position % 97 else "\n" for position in range(n_tokens)]
    about = {"model": "none", "layers": f"{n_layers}", "experts": "all", "routers": "none"}
    budget = {"ratio": 0.75, "scope": "global", "min_share": 0.2, "min_pairs": 40}
    answer = {"question": "Why?", "full": [["a", 1]], "compressed": [["a", 1]]}
    names = [f"expert {index}" for index in range(n_experts)]
    return payload(tokens, records, names, budget, [], about | {"full_mib": 4, "compressed_mib": 1}, [answer])
