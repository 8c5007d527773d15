"""See what a router keeps of a text: one prefill, one page; or a small web app around it."""

from kvpress_moe.explore.exploration import Reading, explore, make_press, read
from kvpress_moe.explore.page import page

__all__ = ["Reading", "explore", "make_press", "page", "read"]
