"""The press: from the hidden states of a prompt to a smaller cache, stage by stage."""

from kvpress_moe.press.moe_router_press import MoERouterPress as MoERouterPress

__all__ = ["MoERouterPress"]
