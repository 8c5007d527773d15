"""Caches after eviction: masks that fit shortened layers, and heads of different lengths, whose memory is freed."""

from kvpress_moe.cache.ragged import RaggedCache as RaggedCache
from kvpress_moe.cache.ragged import RaggedLayer as RaggedLayer

__all__ = ["RaggedCache", "RaggedLayer"]
