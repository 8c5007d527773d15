"""
What kvpress 0.5.5 has to learn so that its own code works beside this package.

Done once, when a press is made or a cache is loaded.

- Its pipeline takes an answer off the cache by slicing layers to their former length. Layers that count the tokens
  that were processed have to be cropped instead. Layers with windows and quantised layers hold too little to be cut:
  they become what they were before the answer.
- With releases of transformers after 5.2, its hooks read arguments that have another name or are gone, and its pipeline
  calls models by a deprecated name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

from kvpress.pipeline import KVPressTextGenerationPipeline
from kvpress.presses.base_press import BasePress
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer

from kvpress_moe.model.transformers_api import KVPRESS_KNOWS, attention_arguments, crop, own_names

_TAUGHT = "kvpress_moe_taught"


def teach_kvpress() -> None:
    """Change kvpress's classes as the module says. Idempotent, also for press classes that are defined later."""
    _replace(KVPressTextGenerationPipeline, "_remove_answer_from_cache", _removing)
    _replace(
        KVPressTextGenerationPipeline,
        "generate_answer",
        lambda method: _noting(method if KVPRESS_KNOWS else _by_own_names(method)),
    )
    if KVPRESS_KNOWS:
        return
    _replace(KVPressTextGenerationPipeline, "_forward", _by_own_names)
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


def _noting(generate_answer: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(generate_answer)
    def noted(pipeline: Any, question_ids: Any, cache: Any, *args: Any, **kwargs: Any) -> Any:
        """Note the layers that cannot give up single tokens. Their tensors are replaced, not changed, by new tokens."""
        pipeline._before_answer = {
            id(layer): dict(vars(layer))
            for layer in cache.layers
            if isinstance(layer, (DynamicSlidingWindowLayer, QuantizedLayer))
        }
        return generate_answer(pipeline, question_ids, cache, *args, **kwargs)

    return noted


def _removing(remove: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(remove)
    def removed(pipeline: Any, cache: Any, lengths: list[int]) -> None:
        """Layers with windows and quantised layers become as they were; others are cropped, or cut as in kvpress."""
        before = vars(pipeline).pop("_before_answer", {})
        for layer, length in zip(cache.layers, lengths, strict=True):
            if id(layer) in before:
                vars(layer).clear()
                vars(layer).update(before[id(layer)])
            elif getattr(layer, "n_evicted", 0):
                crop(layer, length)
            else:
                remove(pipeline, _OneLayer([layer]), [length])

    return removed


@dataclass
class _OneLayer:
    """What kvpress's method reads of a cache, for one layer of it."""

    layers: list[Any]


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
