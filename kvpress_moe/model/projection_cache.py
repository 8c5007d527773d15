"""ProjectionCache: keeps what attention layers project in their own forward, so that experts can use it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpress_moe.model.layers import Attention, language_model

NAMES = ("q_proj", "k_proj", "qkv_proj")


class ProjectionCache:
    """
    Keeps a layer's projected queries and keys, before norms and rotation, until the layer has been judged.

    Leverage scores need the unrotated keys of all tokens. ExpectedAttention and NonCausalAttn need the unrotated
    queries. To project them again would take up to a tenth of a layer's time. At most one layer is held at a time.
    """

    def __init__(self) -> None:
        self._layer: nn.Module | None = None
        self._projected: dict[str, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_layer": None, "_projected": {}}

    @contextmanager
    def watch(self, model: PreTrainedModel) -> Iterator[None]:
        """Keep what all layers project inside the block."""
        with ExitStack() as hooks:
            for attention in (layer.self_attn for layer in language_model(model).layers):
                for name in NAMES:
                    projection = getattr(attention, name, None)
                    if isinstance(projection, nn.Module):
                        hooks.callback(projection.register_forward_hook(self._keeping(attention, name)).remove)
            yield

    def _keeping(self, attention: Attention, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if getattr(attention, name) is not module:  # a model that was copied inside the block took this hook along
                return
            if self._layer is not attention:
                self.clear()
                self._layer = attention
            self._projected[name] = (args[0], output)

        return keep

    def of(self, attention: Attention, hidden_states: Tensor) -> dict[str, Tensor]:
        """What this layer projected from exactly these hidden states, by the name of the projection."""
        if self._layer is not attention:
            return {}
        return {name: output for name, (given, output) in self._projected.items() if given is hidden_states}

    def clear(self) -> None:
        """Forget what is held."""
        self._layer = None
        self._projected = {}
