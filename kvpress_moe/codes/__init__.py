"""Codes: keys and values at 2 to 8 bits a channel, bit-packed, with a scale and zero, or a gain and position, each."""
