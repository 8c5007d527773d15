"""Models: their layers, attention and fingerprints; loading them; hooks on them."""
