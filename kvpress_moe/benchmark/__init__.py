"""The benchmark: every method on the same prefill, measured against the full cache."""
