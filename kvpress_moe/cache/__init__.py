"""Caches after eviction: masks that fit shortened layers, and heads of different lengths, whose memory is freed."""

from kvpress_moe.cache.files import SavedCache as SavedCache
from kvpress_moe.cache.files import load_cache as load_cache
from kvpress_moe.cache.files import save_cache as save_cache
from kvpress_moe.cache.kept import kept_pairs as kept_pairs
from kvpress_moe.cache.ragged import RaggedCache as RaggedCache
from kvpress_moe.cache.ragged import RaggedLayer as RaggedLayer
from kvpress_moe.cache.ragged_attention import use_ragged_attention as use_ragged_attention

__all__ = [
    "RaggedCache",
    "RaggedLayer",
    "SavedCache",
    "kept_pairs",
    "load_cache",
    "save_cache",
    "use_ragged_attention",
]
