"""Names of experts in one text, as command line and web page take them."""

from __future__ import annotations


def parse_experts(experts: str | None) -> str | list[str] | None:
    """``"guide"`` stays a set's name; ``"knorm,tova"`` becomes a list."""
    if experts is None or experts.strip() in ("guide", "strong"):
        return experts and experts.strip()
    return [name.strip() for name in experts.split(",")]
