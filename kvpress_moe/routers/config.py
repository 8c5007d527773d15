"""RouterConfig: all that is needed to build a model's routers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvpress_moe.files import is_number, is_text, is_whole
from kvpress_moe.routers.base import BaseMoERouter
from kvpress_moe.routers.pikv import PiKVMoERouter

ROUTERS: dict[str, type[BaseMoERouter]] = {"base": BaseMoERouter, "pikv": PiKVMoERouter}


@dataclass(frozen=True)
class RouterConfig:
    """
    All that is needed to build a model's routers.

    Parameters
    ----------
    router_type : {"base", "pikv"}
    experts : tuple of str
        Names of the experts, in the order of the routers' outputs.
    num_layers, hidden_size : int
        Number of layers L and hidden size C of the model.
    dropout : float
    bottleneck : int, default=32
    trained : bool, default=False
        Whether the weights were trained. Untrained routers weigh all experts alike.
    num_heads : int, default=0
        Number of KV heads of the model if the routers are calibrated (all trained ones are), else 0.
    learned : int, default=0
        Width of the expert ``"learned"``, 0 if it is not among the experts.
    learned_sees : bool, default=False
        Whether the expert ``"learned"`` sees the ranks by the other experts.
    top_k : int, default=2
        Experts per token that the routers were trained with.
    strategies : bool, default=False
        Whether the routers were trained to choose compression strategies.
    reach : int, default=0
        Distance from the prompt's end, in tokens, from which scores decay. 0: they never do.
    """

    router_type: str
    experts: tuple[str, ...]
    num_layers: int
    hidden_size: int
    dropout: float = 0.1
    bottleneck: int = 32
    trained: bool = False
    num_heads: int = 0
    learned: int = 0
    learned_sees: bool = False
    top_k: int = 2
    strategies: bool = False
    reach: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_seen(self) -> int:
        """Number of ranks of each token that the expert ``"learned"`` sees: by every other expert, in every head."""
        return self.num_heads * (self.num_experts - 1) if self.learned and self.learned_sees else 0

    @property
    def num_weights(self) -> int:
        """How many numbers the router of one layer has, running averages included."""
        gate = self.bottleneck * (self.hidden_size + 1) + self.num_experts * (self.bottleneck + 1)
        feedback = self.num_experts * (self.num_experts + 1) if self.router_type == "pikv" else 0
        calibration = self.num_heads * (2 * self.num_experts + 1 + bool(self.reach))
        inputs = self.hidden_size + 2 * self.num_seen
        learned = self.learned * (inputs + 1) + self.num_heads * (self.learned + 1) if self.learned else 0
        rule = 2 + 2 * self.num_heads * (1 + self.bottleneck) if self.strategies else 0
        return gate + feedback + calibration + learned + rule

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"experts": list(self.experts)}

    @classmethod
    def from_dict(cls, saved: Any) -> RouterConfig:
        """
        Build a config from what :meth:`as_dict` returned. The values may come from a file that anybody has written.

        Raises
        ------
        ValueError, TypeError, KeyError
            If a field is wrong, unknown or missing.
        """
        if not isinstance(saved["experts"], list):
            raise ValueError("config: experts: expected a list of names")
        config = cls(**{**saved, "experts": tuple(saved["experts"])})
        sizes = ("num_layers", "hidden_size", "bottleneck")
        right = {
            "router_type": isinstance(config.router_type, str) and config.router_type in ROUTERS,
            "experts": bool(config.experts) and all(map(is_text, config.experts)),
            **{name: is_whole(getattr(config, name), 1) for name in sizes},
            **{name: is_whole(getattr(config, name)) for name in ("num_heads", "learned", "reach")},
            **{name: type(getattr(config, name)) is bool for name in ("trained", "learned_sees", "strategies")},
            "dropout": is_number(config.dropout) and 0 <= config.dropout < 1,
            "top_k": is_whole(config.top_k, 1) and config.top_k <= config.num_experts,
        }
        for name, is_right in right.items():
            if not is_right:
                raise ValueError(f"config: {name}: got {str(getattr(config, name))[:80]}")
        if bool(config.learned) != ("learned" in config.experts) and config.num_heads:
            raise ValueError("config: learned: expected a width if 'learned' is among the experts, else 0")
        if (config.learned or config.strategies or config.reach) and not config.num_heads:
            raise ValueError("config: num_heads: got 0, expected the model's KV heads beside what was trained for them")
        return config
