"""Experts: what judges KV pairs, and how their scores become one."""
