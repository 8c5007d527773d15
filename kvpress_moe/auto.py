"""Importing this module adds MoERouterPress and the router classes to ``kvpress`` and ``kvpress.presses``."""

import kvpress
import kvpress.presses

from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.routers import BaseMoERouter, PiKVMoERouter

for _home in (kvpress, kvpress.presses):
    for _added in (MoERouterPress, BaseMoERouter, PiKVMoERouter):
        setattr(_home, _added.__name__, _added)
