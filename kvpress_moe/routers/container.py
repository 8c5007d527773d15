"""Routers: one router per layer, as one module with state_dict, .to and a configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn

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
        Names of the experts that the outputs stand for, in order.
    num_layers, hidden_size : int
        L and C of the model.
    dropout : float
    bottleneck : int, default=32
    trained : bool, default=False
        Whether the weights were fitted; untrained routers weigh all experts alike.
    num_heads : int, default=0
        KV heads of the model where the routers are calibrated (all trained ones are), 0 where they are not.
    learned : int, default=0
        Width of the expert ``"learned"``, 0 where it is not among the experts.
    learned_sees : bool, default=False
        Whether that expert sees the ranks that the others give.
    top_k : int, default=2
        Experts per token that the routers were trained with.
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

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_seen(self) -> int:
        """Ranks that the learned expert sees of each token: of every other expert, in every head."""
        return self.num_heads * (self.num_experts - 1) if self.learned and self.learned_sees else 0

    def as_dict(self) -> dict:
        return asdict(self) | {"experts": list(self.experts)}


class Routers(nn.Module):
    """
    The routers of all layers of one model.

    Parameters
    ----------
    config : RouterConfig
    fingerprint : dict, optional
        Of the model they belong to, see :func:`kvpress_moe.fingerprint.fingerprint`. ``None``: any model of the right
        size.
    """

    def __init__(self, config: RouterConfig, fingerprint: dict | None = None):
        super().__init__()
        self.config = config
        self.fingerprint = fingerprint
        router_class = ROUTERS[config.router_type]
        self.layers = nn.ModuleList(
            router_class(
                config.hidden_size,
                config.num_experts,
                config.dropout,
                config.bottleneck,
                seed=layer_idx,
                num_heads=config.num_heads,
                learned=config.learned,
                num_seen=config.num_seen,
            )
            for layer_idx in range(config.num_layers)
        )
        self.eval()  # dropout is for training alone

    def place(self, layer_idx: int, device: torch.device, dtype: torch.dtype) -> BaseMoERouter:
        """The router of a layer, moved once to the layer's device and dtype (running averages stay float32)."""
        router = self.layers[layer_idx]
        weight = router.down.weight
        if weight.device != device or weight.dtype != dtype:
            with torch.inference_mode(False):
                router.to(device)
                for linear in (m for m in router.modules() if isinstance(m, nn.Linear)):
                    linear.to(dtype)
        return router
