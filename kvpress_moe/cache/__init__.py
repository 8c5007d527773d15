"""Caches after eviction: masks that fit shortened layers, and ragged layers, whose heads have different lengths."""

from kvpress_moe.cache.attention_dispatch import use_ragged_attention as use_ragged_attention
from kvpress_moe.cache.joined_cache import read_together as read_together
from kvpress_moe.cache.kept_pairs import kept_pairs as kept_pairs
from kvpress_moe.cache.packed_layer import PackedLayer as PackedLayer
from kvpress_moe.cache.ragged_cache import RaggedCache as RaggedCache
from kvpress_moe.cache.ragged_layer import RaggedLayer as RaggedLayer
from kvpress_moe.cache.saved_cache import SavedCache as SavedCache
from kvpress_moe.cache.saved_cache import load_cache as load_cache
from kvpress_moe.cache.saved_cache import save_cache as save_cache

__all__ = [
    "PackedLayer",
    "RaggedCache",
    "RaggedLayer",
    "SavedCache",
    "kept_pairs",
    "load_cache",
    "read_together",
    "save_cache",
    "use_ragged_attention",
]
