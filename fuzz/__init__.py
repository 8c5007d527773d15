"""Fuzzing: ``python -m fuzz`` gives damaged and forged files, as strangers might send them, to every loader."""
