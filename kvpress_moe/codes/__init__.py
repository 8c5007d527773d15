"""Codes: keys and values at 2 to 8 bits a channel, bit-packed, with a scale each, and some keys with a position."""
