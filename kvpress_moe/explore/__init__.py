"""See what a router keeps of a text: one prefill, one page; or a small web app around it."""

from kvpress_moe.explore.exploration import PrefilledText, explore, make_press, prefill_text
from kvpress_moe.explore.page import page

__all__ = ["PrefilledText", "explore", "make_press", "page", "prefill_text"]
