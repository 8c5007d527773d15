"""Exact arithmetic for codes: no gradients, no autocast, and tensors that outlive inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def exact(device: torch.device | str = "cpu") -> Iterator[None]:
    """
    Compute in the types of the tensors, without gradients.

    Autocast would round what is to be coded, and it cannot join float16 tensors on a CPU.
    """
    kind = torch.device(device).type
    autocast = torch.is_autocast_enabled(kind)  # some kinds of devices have none, and refuse to have it disabled
    with torch.no_grad(), torch.autocast(kind, enabled=False) if autocast else nullcontext():
        yield


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors that are made here may be used anywhere later, also if inference mode is on now."""
    with torch.inference_mode(False), torch.no_grad():
        yield
