"""A press that takes its whole process down, once."""

import os
from dataclasses import dataclass
from pathlib import Path

from kvpress import KnormPress


@dataclass
class DyingPress(KnormPress):
    flag: str = ""

    def score(self, *args, **kwargs):
        if not Path(self.flag).exists():
            Path(self.flag).touch()
            os._exit(1)
        return super().score(*args, **kwargs)
