"""Exact arithmetic for codes: no gradients, no autocast, and tensors that outlive inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact(device: torch.device | str = "cpu") -> Iterator[None]:
    """
    Compute in the types of the tensors, without gradients.

    Autocast would round what is to be coded, and it cannot join float16 tensors on a CPU.
    """
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        yield


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors that are made here may be used anywhere later, also if inference mode is on now."""
    with torch.inference_mode(False), torch.no_grad():
        yield
