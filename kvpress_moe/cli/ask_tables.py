"""What `kvpress-moe ask` prints: the answers of every cache, and what the experts did."""

from __future__ import annotations

import math
from typing import Any


def promise_of(stats: dict[str, Any]) -> dict[str, Any]:
    """``{"promise": …}``: what was promised for the latest prompt, of a press's statistics. Empty if nothing was."""
    return {"promise": stats["promises"][-1]} if "promises" in stats else {}


def say_promise(promise: dict[str, Any], precision: str | None) -> str:
    """One sentence about what was promised and what it took."""
    what = "pairs" if precision is None else "bytes of a 16-bit cache"
    if not promise["is_enough"]:
        held = "max_bytes or the menu is too small for it"
    elif promise["is_unlike"]:
        held = "nothing is promised, because the text is unlike those of the calibration; it got a wider margin"
    else:
        held = f"it holds for {promise['confidence']:.0%} of texts like those of the calibration"
    return (
        f"max_kl {promise['max_kl']:g}: {promise['share']:.1%} of the {what} kept, expected KL divergence "
        f"{promise['expected_kl']:.2g}; {held}"
    )


def show_answers(result: dict[str, Any], console: Any) -> None:
    """Print the answers from a cache file."""
    from rich.table import Table
    from rich.text import Text

    console.print(
        f"[bold]{result['context_tokens']}[/] tokens in [bold]{result['mib']:.1f} MiB[/], loaded in "
        f"{result['load_seconds']:.2f} s, answered in {result['answer_seconds']:.2f} s",
        highlight=False,
    )
    table = Table()
    for heading in ("question", "answer"):
        table.add_column(heading, ratio=1)
    for question, answer in zip(result["questions"], result["answers"], strict=True):
        table.add_row(Text(question), Text(answer))
    console.print(table)


def show(result: dict[str, Any], layers: bool, console: Any) -> None:
    """Print the result: one line about the run, the answers, and what the experts did."""
    from rich.table import Table
    from rich.text import Text

    full = result["methods"][0]
    n_pressed, n_layers = len(result["expert_usage_ratios"]), result["num_hidden_layers"]
    of_what = "pairs" if result["precision"] is None else "bytes"
    of_layers = f"of {n_pressed} of {n_layers} layers " if n_pressed < n_layers else ""  # rest: sliding window
    promised = "promise" in result
    removed = "" if promised else f"{result['compression_ratio']:.0%} of the {of_what} {of_layers}removed, "
    console.print(
        f"[bold]{result['context_tokens']}[/] tokens, prefilled once in [bold]{result['prefill_seconds']:.1f} s[/] on "
        f"{result['device']}; {removed}cache "
        f"[bold]{full['mib']:.1f}[/] → [bold]{result['methods'][1]['mib']:.1f} MiB[/]",
        highlight=False,
    )
    if promised:
        console.print(say_promise(result["promise"], result["precision"]), highlight=False)
    for number, question in enumerate(result["questions"]):
        table = Table(title=Text(question), title_justify="left", title_style="bold", show_lines=False)
        table.add_column("cache")
        table.add_column("answer", ratio=1)
        for heading in ("MiB", "compress s", "answer s"):
            table.add_column(heading, justify="right")
        for row in result["methods"]:
            table.add_row(
                row["method"],
                Text(row["answers"][number]),
                f"{row['mib']:.1f}",
                f"{row['compression_seconds']:.2f}" if row is not full else "–",
                f"{row['answer_seconds'] / len(result['questions']):.2f}",
                style="bold" if row["method"] == "router" else None,
            )
        console.print(table)
    if result["strategies"]:
        show_strategies(result["strategies"], console)
    if result["expert_usage_ratios"]:
        show_experts(result, layers, console)


def show_strategies(strategies: dict[str, dict[str, float]], console: Any) -> None:
    """Print how many pairs got which strategy, and what they take."""
    from rich.table import Table

    table = Table(title="Strategies of the router's cache", title_justify="left", title_style="bold")
    table.add_column("strategy")
    for heading in ("share of the pairs", "KiB"):
        table.add_column(heading, justify="right")
    n_pairs = sum(counts["pairs"] for counts in strategies.values())
    for name, counts in strategies.items():
        table.add_row(name, f"{counts['pairs'] / n_pairs:.1%}", f"{counts['bytes'] / 2**10:.0f}")
    console.print(table)


def show_experts(result: dict[str, Any], layers: bool, console: Any) -> None:
    """Print which experts scored the tokens: one row per expert, or with ``layers`` one row per layer."""
    from rich.table import Table

    names, ratios, rates = result["experts"], result["expert_usage_ratios"], result["cache_hit_rates"]
    if layers:
        table = Table(
            title="Experts by layer: share of the routing / hit rate", title_justify="left", title_style="bold"
        )
        table.add_column("layer", justify="right")
        for name in names:
            table.add_column(name, justify="right")
        for layer, shares in ratios.items():
            table.add_row(str(layer), *(f"{s:.0%} / {r:.2f}" for s, r in zip(shares, rates[layer], strict=True)))
        console.print(table)
    elif result["top_k"] == len(names):  # every token goes to every expert: their shares and hit rates are the same
        everyone = f"All {len(names)} experts ({', '.join(names)}) judge" if len(names) > 1 else f"{names[0]} judges"
        hit_rate = sum(of_layer[0] for of_layer in rates.values()) / len(rates)
        console.print(f"{everyone} every token; hit rate {hit_rate:.2f}, mean of {len(rates)} layers.", highlight=False)
    else:
        title = f"Experts, top {result['top_k']} of {len(names)} for each token; means of {len(ratios)} layers"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("expert")
        for heading in ("share of the routing", "lowest", "highest", "hit rate"):
            table.add_column(heading, justify="right")
        for index, name in enumerate(names):
            shares = [of_layer[index] for of_layer in ratios.values()]
            hits = [of_layer[index] for of_layer in rates.values() if not math.isnan(of_layer[index])]
            shown = (sum(shares) / len(shares), min(shares), max(shares))
            hit_rate = f"{sum(hits) / len(hits):.2f}" if hits else "–"
            table.add_row(name, *(f"{share:.0%}" for share in shown), hit_rate)
        console.print(table)
