"""Budgets: how many pairs stay, which heads share them, and what the eviction cost."""
