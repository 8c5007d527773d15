"""Routers: one router per layer, as one module with state_dict, .to and a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvpress_moe.codes.key_transform import KeyTransform
from kvpress_moe.routers.base import BaseMoERouter
from kvpress_moe.routers.config import ROUTERS, RouterConfig
from kvpress_moe.routers.promise import Promise


class Routers(nn.Module):
    """
    The routers of all layers of one model.

    Parameters
    ----------
    config : RouterConfig
    fingerprint : dict, optional
        Fingerprint of the model that they belong to, see :func:`kvpress_moe.model.fingerprint.fingerprint`. ``None``:
        any model of the right size.

    Attributes
    ----------
    key_transforms : dict of int -> KeyTransform, or None
        Static transforms of keys, by layer. None: keys are coded without them.
    promises : dict of str -> Promise
        What ``max_kl`` needs, by the name of the precisions that a press may choose from, see
        :func:`kvpress_moe.press.promised_budget.setting_of`. Empty: the routers were not calibrated.
    """

    layers: Any  # one BaseMoERouter per layer; to torch's types the members of a ModuleList are only Modules

    def __init__(self, config: RouterConfig, fingerprint: dict[str, Any] | None = None):
        super().__init__()
        self.config = config
        self.key_transforms: dict[int, KeyTransform] | None = None
        self.promises: dict[str, Promise] = {}
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
                strategies=config.strategies,
                reach=config.reach,
            )
            for layer_idx in range(config.num_layers)
        )
        self.eval()  # dropout is for training only

    def place(self, layer_idx: int, device: torch.device, dtype: torch.dtype) -> BaseMoERouter:
        """The router of a layer, moved once to the layer's device and dtype. Running averages stay float32."""
        router: BaseMoERouter = self.layers[layer_idx]
        weight = router.down.weight
        if weight.device != device or weight.dtype != dtype:
            with torch.inference_mode(False):
                router.to(device)
                for linear in (m for m in router.modules() if isinstance(m, nn.Linear)):
                    linear.to(dtype)
        return router
