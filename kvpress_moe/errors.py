"""
The package's errors. Every message names the field or input, the given value, what is accepted, and the remedy.

KVPressMoEError
├── SettingError (ValueError)            a setting of the press or of a command
├── UnsupportedModelError (ValueError)   a model class or configuration that a press cannot serve
├── UnsupportedInputError (ValueError)   an input (empty, padded, uncached) that a press cannot serve
├── CheckpointError (ValueError)         a router file that is broken or belongs to another model
├── ExpertError (RuntimeError)           an expert failed to score, or returned something that is no score
├── BusyError (RuntimeError)             the explorer's model is busy with another text
├── NotFiniteError (ArithmeticError)     NaN or infinity where they would decide which pairs stay
└── WriteError (OSError)                 a file could not be written; what was there before is intact
"""

from __future__ import annotations

from typing import Any


class KVPressMoEError(Exception):
    """Base class of all errors that this package raises on purpose."""


class SettingError(KVPressMoEError, ValueError):
    """A setting is wrong. The message names the field, the value, the accepted values and the remedy."""

    def __init__(self, field: str, got: object, expected: str, remedy: str):
        super().__init__(f"{field}: got {got!r}, expected {expected}. {remedy}")
        self._arguments = (field, got, expected, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments  # for pickle: process pools send errors back


class UnsupportedModelError(KVPressMoEError, ValueError):
    """The model cannot be compressed by this press."""


class UnsupportedInputError(KVPressMoEError, ValueError):
    """The input of a forward pass cannot be compressed by this press."""


class CheckpointError(KVPressMoEError, ValueError):
    """A router checkpoint cannot be used."""


class ExpertError(KVPressMoEError, RuntimeError):
    """An expert could not score a layer."""


class BusyError(KVPressMoEError, RuntimeError):
    """The explorer's model is busy. It works on one text at a time."""


class NotFiniteError(KVPressMoEError, ArithmeticError):
    """NaN or infinity in hidden states, keys, values, attention or scores of a prompt that is to be compressed."""


class WriteError(KVPressMoEError, OSError):
    """
    A file could not be written: space or permission is missing, or something that is not a file has its name.

    What was there before is intact, unless the message names files that were replaced already.
    """
