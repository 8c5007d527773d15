"""
What kvpress 0.5.5 has to learn so that its own code works beside this package. Done once, when a press is made.

- Its pipeline takes an answer off the cache by slicing layers to their former length. Layers that count the tokens
  that were processed have to be cropped instead.
- With releases of transformers after 5.2, its hooks read arguments that have another name or are gone, and its pipeline
  calls models by a deprecated name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import kvpress
from kvpress.pipeline import KVPressTextGenerationPipeline
from kvpress.presses.base_press import BasePress

from kvpress_moe.model.transformers_api import KVPRESS_KNOWS, attention_arguments, crop, own_names

_TAUGHT = "kvpress_moe_taught"


def teach_kvpress() -> None:
    """Change kvpress's classes as the module says. Idempotent, also for press classes that are defined later."""
    _replace(KVPressTextGenerationPipeline, "_remove_answer_from_cache", _cropping)
    if KVPRESS_KNOWS:
        return
    for name in ("_forward", "generate_answer"):
        _replace(KVPressTextGenerationPipeline, name, _by_own_names)
    for press in _press_classes(BasePress):
        if "forward_hook" in vars(press):
            _replace(press, "forward_hook", _translating)


def _press_classes(base: type[Any]) -> Iterator[type[Any]]:
    yield base
    for derived in base.__subclasses__():  # type: type[Any]
        yield from _press_classes(derived)


def _replace(owner: type, name: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    method = vars(owner)[name]
    if not hasattr(method, _TAUGHT):
        changed = change(method)
        setattr(changed, _TAUGHT, True)
        setattr(owner, name, changed)


def _cropping(remove: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(remove)
    def removed(pipeline: Any, cache: Any, lengths: list[int]) -> None:
        """Layers with evicted tokens are cropped; kvpress slices the others."""
        n_evicted = [getattr(layer, "n_evicted", 0) for layer in cache.layers]
        if not any(n_evicted):
            remove(pipeline, cache, lengths)
            return
        if isinstance(cache, kvpress.pipeline.QuantizedCache):
            remove(pipeline, cache, [length - gone for length, gone in zip(lengths, n_evicted, strict=True)])
            for layer, length, gone in zip(cache.layers, lengths, n_evicted, strict=True):
                layer.cumulative_length = length - gone
            return
        for layer, length in zip(cache.layers, lengths, strict=True):
            crop(layer, length)

    return removed


def _by_own_names(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        with own_names(pipeline.model, pipeline.model.model):
            return method(pipeline, *args, **kwargs)

    return called


def _translating(hook: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(hook)
    def translated(press: Any, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        return hook(press, module, input, attention_arguments(module, kwargs), output)

    return translated
