"""The explorer: show what a router keeps of a text, as one HTML page or in a small web app."""

from kvpress_moe.explore.exploration import PrefilledText, explore, make_press, prefill_text
from kvpress_moe.explore.page import page

__all__ = ["PrefilledText", "explore", "make_press", "page", "prefill_text"]
