"""Recipe: a hash of all that changes the cache of a document, beside its text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.model.layers import language_model
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import weights_hash

_STEP = 997  # every so-manieth weight is looked at


def recipe_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    routers: Routers | None,
    settings: Mapping[str, Any] | None,
) -> str:
    """
    The hash for a server with this model, these routers and these settings of the press; None: no press.

    It covers samples of the weights of all layers, the type of the numbers, the chat template, what the routers
    promise, and the version of this package.
    """
    found = hashlib.sha256()
    press = (
        "none"
        if routers is None or settings is None
        else [
            weights_hash(routers),
            {name: promise.as_dict() for name, promise in routers.promises.items()},
            {name: value for name, value in settings.items() if name != "router"},
        ]
    )
    about = [
        model_fingerprint(model),
        str(model.dtype),
        str(tokenizer.chat_template),
        len(tokenizer),
        press,
        version("kvpress-moe"),
    ]
    found.update(json.dumps(about, sort_keys=True, default=str).encode())
    for layer in language_model(model).layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                found.update(module.weight.detach().flatten()[::_STEP].float().cpu().numpy().tobytes())
    return found.hexdigest()
