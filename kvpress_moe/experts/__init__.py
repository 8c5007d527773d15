"""Experts: they judge KV pairs, and their scores are mixed into one score."""
