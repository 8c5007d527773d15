"""Routers: from hidden states (B, S, C) to routing weights (B, S, E). One class per file, one signature for all."""

from kvpress_moe.routers.base import BaseMoERouter as BaseMoERouter
from kvpress_moe.routers.base import RouterOutput as RouterOutput
from kvpress_moe.routers.config import ROUTERS as ROUTERS
from kvpress_moe.routers.config import RouterConfig as RouterConfig
from kvpress_moe.routers.pikv import PiKVMoERouter as PiKVMoERouter
from kvpress_moe.routers.routers import Routers as Routers
from kvpress_moe.routers.routing import Routing as Routing

__all__ = ["ROUTERS", "BaseMoERouter", "PiKVMoERouter", "RouterConfig", "RouterOutput", "Routers", "Routing"]
