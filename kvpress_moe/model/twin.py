"""A second model with the same weights, but with hooks of its own."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """
    Copy a model, but not its weights.

    A press puts hooks on the model that it serves. With a twin, one model reads a prompt with a press while the other
    one answers without.

    Parameters
    ----------
    model : PreTrainedModel
        It must not be in use by a press, and must stay on its device.
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
