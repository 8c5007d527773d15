"""AttentionView: an attention layer as scorers see it. Scorers share its projections. The model is not changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from kvpress_moe.model.layers import Attention, own_layer_type

#: Layers whose norms of queries and keys kvpress does not know -> layers with the same norms that it knows.
NORMED_ALIKE: dict[type[nn.Module], type[nn.Module]] = {Qwen3MoeAttention: Qwen3Attention}


class AttentionView:
    """
    Stands in for an attention layer while experts score it.

    In kvpress, ExpectedAttention, Cap and NonCausalAttn each project all hidden states to queries. Each projection
    takes a tenth of a layer's time. Here they get what the layer itself projected, if that is known. Otherwise the
    first projection of at least half of the tokens covers all tokens and is kept. Later projections are slices of it.

    The view also gives Gemma 3's rotary embedding the layer type, which kvpress's presses do not pass.

    kvpress applies the norms of queries and keys to Qwen 3 and Gemma 3 only. So a Qwen 3 MoE layer appears as a Qwen 3
    layer. OLMoE's norms come before the heads are split, so here they are a part of its projections.

    Everything else is the layer's own. ``isinstance`` gives the same answers as for the layer.

    Parameters
    ----------
    module : nn.Module
        The attention layer.
    hidden_states : Tensor, shape (B, Q, C)
        The tokens whose projections are kept.
    projected : dict of str -> Tensor, optional
        Projections of these tokens that are already known, by the name of the projection.
    """

    def __init__(self, module: Attention, hidden_states: Tensor, projected: dict[str, Tensor] | None = None):
        self._module = module
        self._hidden_states = hidden_states
        self._projected: dict[str, Tensor] = dict(projected or {})

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # kvpress asks isinstance(module, Qwen3Attention) to find QK norms
        return NORMED_ALIKE.get(type(self._module), type(self._module))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def q_proj(self, hidden_states: Tensor) -> Tensor:
        return self._project("q_proj", hidden_states)

    def k_proj(self, hidden_states: Tensor) -> Tensor:
        return self._project("k_proj", hidden_states)

    def qkv_proj(self, hidden_states: Tensor) -> Tensor:
        return self._project("qkv_proj", hidden_states)

    def rotary_emb(self, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        layer_type = own_layer_type(self._module)
        of_type = () if layer_type is None else (layer_type,)
        turned: tuple[Tensor, Tensor] = self._module.rotary_emb(states, position_ids, *of_type)
        return turned

    def _project(self, name: str, hidden_states: Tensor) -> Tensor:
        projection = getattr(self._module, name)
        start = slice_start(self._hidden_states, hidden_states)
        n_tokens, n_all = hidden_states.shape[1], self._hidden_states.shape[1]
        if start is None or (name not in self._projected and 2 * n_tokens < n_all):
            return self._normed(name, projection(hidden_states))
        if name not in self._projected:
            self._projected[name] = projection(self._hidden_states)
        return self._normed(name, self._projected[name][:, start : start + n_tokens])

    def _normed(self, name: str, projected: Tensor) -> Tensor:
        module = self._module
        if not isinstance(module, OlmoeAttention):
            return projected
        normed: Tensor = (module.q_norm if name == "q_proj" else module.k_norm)(projected)
        limit = module.config.clip_qkv
        return normed if limit is None else normed.clamp(-limit, limit)


def slice_start(whole: Tensor, given: Tensor) -> int | None:
    """Where ``given`` (B, Q, C) begins in ``whole`` (B, S, C), if it is a view of a slice of its tokens. Else None."""
    same = (
        given.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        and given.stride() == whole.stride()
        and given.shape[0] == whole.shape[0]
        and given.shape[2] == whole.shape[2]
    )
    return (given.storage_offset() - whole.storage_offset()) // whole.stride(1) if same else None
