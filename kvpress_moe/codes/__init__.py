"""Codes: keys and values at 2 to 8 bits a channel, bit-packed, with one scale and one zero for each vector."""
