"""
Compress the cache of a long prompt with a mixture of experts, and look at who decided.

    python examples/moe_router_example.py
"""

from kvpress.pipeline import KVPressTextGenerationPipeline

from kvpress_moe import MoERouterPress, load_model

CONTEXT = (
    "The lamp of the lighthouse was replaced in September. "
    + "The fishing fleet counts forty-three boats, two fewer than a year ago. " * 10
    + "The code of the old safe in the lighthouse is 7194. "
    + "The new crane lifts twelve tons, twice as much as the old one. " * 10
)
QUESTION = "What is the code of the old safe?"


def main(model_name: str | None = None) -> None:
    model, tokenizer = load_model(model_name)  # SmolLM2-135M-Instruct by default
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)

    for press in (None, MoERouterPress(compression_ratio=0.5), MoERouterPress(compression_ratio=0.5, experts="strong")):
        answer = pipeline(CONTEXT, question=QUESTION, press=press, max_new_tokens=20)["answer"]
        print(f"{'full cache' if press is None else list(press.expert_strategies.values())}: {answer.strip()!r}")

    # Who judged in which layer, and how much of the attention fell on pairs that stayed
    stats = press.get_stats()
    print(f"routed {stats['forward_count']} prompt, average auxiliary loss {stats['avg_aux_loss']:.3f}")
    for layer_idx, layer in stats["layer_stats"].items():
        shares = layer["router_stats"]["expert_usage_ratios"]
        rates = layer["expert_compression_stats"]["cache_hit_rates"]
        print(f"layer {layer_idx:>2}:", "  ".join(f"{s:4.0%} hit {r:.2f}" for s, r in zip(shares, rates, strict=True)))


if __name__ == "__main__":
    main()
