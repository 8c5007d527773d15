"""
kvpress-moe: a mixture-of-experts router press for NVIDIA's kvpress.

Names are loaded when they are first used. So importing the package is fast, and it patches nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "BaseMoERouter": "kvpress_moe.routers",
    "CheckpointError": "kvpress_moe.errors",
    "ExpertError": "kvpress_moe.errors",
    "KVPressMoEError": "kvpress_moe.errors",
    "MoERouterPress": "kvpress_moe.press.moe_router_press",
    "NotFiniteError": "kvpress_moe.errors",
    "PiKVMoERouter": "kvpress_moe.routers",
    "RaggedCache": "kvpress_moe.cache",
    "RouterConfig": "kvpress_moe.routers",
    "RouterOutput": "kvpress_moe.routers",
    "Routers": "kvpress_moe.routers",
    "SettingError": "kvpress_moe.errors",
    "UnsupportedInputError": "kvpress_moe.errors",
    "UnsupportedModelError": "kvpress_moe.errors",
    "WriteError": "kvpress_moe.errors",
    "load_cache": "kvpress_moe.cache",
    "load_model": "kvpress_moe.model.loading",
    "load_routers": "kvpress_moe.routers.checkpoint",
    "save_cache": "kvpress_moe.cache",
    "save_routers": "kvpress_moe.routers.checkpoint",
    "use_ragged_attention": "kvpress_moe.cache",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
