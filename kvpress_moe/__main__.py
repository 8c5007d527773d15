"""python -m kvpress_moe"""

from kvpress_moe.cli import main

main()
