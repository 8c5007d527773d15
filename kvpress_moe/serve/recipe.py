"""Recipe: a hash of all that changes the cache of a document, beside its text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.model.layers import language_model
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.routers.checkpoint import weights_hash

_STEP = 997  # every so-manieth weight is looked at


def recipe_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    press: MoERouterPress | None,
) -> str:
    """
    The hash for a server with this model and this press, which has seen the model; None: no press.

    It covers samples of the weights of all layers, the type of the numbers, the chat template, what the routers
    promise, and the version of this package.
    """
    found = hashlib.sha256()
    of_press: list[Any] = []
    if press is not None:
        assert press.routers is not None
        of_press = [
            weights_hash(press.routers),
            {name: promise.as_dict() for name, promise in press.routers.promises.items()},
            {field.name: getattr(press, field.name) for field in fields(press) if field.name != "router"},
        ]
    about = [
        model_fingerprint(model),
        str(model.dtype),
        str(tokenizer.chat_template),
        len(tokenizer),
        of_press,
        version("kvpress-moe"),
    ]
    found.update(json.dumps(about, sort_keys=True, default=str).encode())
    for layer in language_model(model).layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                found.update(module.weight.detach().flatten()[::_STEP].float().cpu().numpy().tobytes())
    return found.hexdigest()
