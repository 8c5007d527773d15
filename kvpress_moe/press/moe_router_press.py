"""MoERouterPress: from hidden states to a smaller cache. Its methods are the stages of this, in order."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kvpress import ScorerPress
from kvpress.presses.base_press import is_prefilling
from kvpress.utils import compute_n_kept
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpress_moe.budget.allocation import least_pairs, mixed_keep_fraction, pairs_kept
from kvpress_moe.budget.cross_layer import Observation, SharedBudget
from kvpress_moe.budget.eviction import evict, kept_mask, select
from kvpress_moe.budget.shared_bytes import SharedBytes
from kvpress_moe.cache.masks import fit_masks
from kvpress_moe.cache.shortened_layer import shorten
from kvpress_moe.experts.expert import Expert
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import mix_experts
from kvpress_moe.model.kvpress_host import teach_kvpress
from kvpress_moe.model.layers import attn_implementation, first_to_compress, language_model, slides
from kvpress_moe.model.support import check_model
from kvpress_moe.model.transformers_api import attention_arguments
from kvpress_moe.press.exclusive_use import is_in_use
from kvpress_moe.press.feedback import Feedback, observe
from kvpress_moe.press.input_checks import check_attention, check_mask, check_unmasked, check_wrapped
from kvpress_moe.press.nan_checks import active_experts, check_all_finite, check_finite
from kvpress_moe.press.packer import Packer
from kvpress_moe.press.pretrained import Pretrained
from kvpress_moe.press.routing_memory import RoutingMemory
from kvpress_moe.press.session import Session
from kvpress_moe.press.settings import Settings, default_top_k, following, number_of_experts
from kvpress_moe.press.shared_eviction import evict_shared
from kvpress_moe.routers import Routers, Routing
from kvpress_moe.routers.active import activate, find_trained
from kvpress_moe.routers.resolve import belong, check_routers, fits, warn_untrained


@dataclass
class MoERouterPress(Settings, Packer, Pretrained, ScorerPress):  # type: ignore[misc]
    """
    A press with a mixture of experts: a router chooses compression experts for every token.

    Each layer has a router. It decides for every token of the prompt which experts judge the token's KV pairs. An
    expert gives every pair a score. Scores are made comparable (rank within the head) and mixed by the router's
    weights. The best ``1 - compression_ratio`` of the pairs stay, in their original order. Only the prompt is
    compressed, once. The press works wherever a ``ScorerPress`` does; wrappers need a number for ``compression_ratio``.

    Parameters
    ----------
    compression_ratio : float or None, default=0.5
        Share of the KV pairs to remove, in [0, 1). The total is exact (``kvpress.utils.compute_n_kept``). ``None``:
        each expert's own keep fraction decides, see :meth:`n_kept`.
    num_experts : int, optional
        Number of experts to choose from: the first ones of the default table, 4 by default, up to 8. If ``experts``
        is given: the number of these experts.
    top_k : int, optional
        Number of experts that judge a token. By default 2, or 1 if there is only one expert, or the number that trained
        routers were trained with.
    capacity_factor : float, default=1.5
        An expert takes at most ``ceil(capacity_factor * tokens * top_k / num_experts)`` tokens of a prompt, at least 1.
    dropout : float, default=0.1
        Dropout inside the routers, in training mode only.
    router_type : {"pikv", "base"}, default="pikv"
        ``"pikv"`` uses the experts' hit rates, ``"base"`` does not.
    cache_aware : bool, default=True
        ``False`` makes a ``"pikv"`` router behave exactly like a ``"base"`` one.
    aux_loss_weight : float, default=0.01
        Scale of the load-balancing loss when routers are trained.
    experts : str or sequence, optional
        ``"guide"``, ``"strong"``, or a list of names, kvpress scorers and functions with the signature of ``score``.
    router : path, str or Routers, optional
        Trained routers: a directory, a hub id, or the object. ``None`` takes the routers that ship with the package
        for exactly this model, if there are any, if neither ``experts`` nor ``num_experts`` was given, and if
        ``router_type`` is ``"pikv"``. Otherwise ``None`` takes untrained routers, which weigh all experts alike until
        cache feedback changes that. If no experts are given, the press uses the experts of the trained routers.
    track_misses : bool, default=False
        Keep evicted keys in CPU memory, and count hit rates with every generated token too, not only with the last
        tokens of the prompt. This takes CPU memory, and time at each step.
    budget : {"uniform", "layer", "global"}, optional
        Which heads share the budget. ``"uniform"``: every head keeps the same number of pairs. ``"layer"``: the heads
        of a layer share. ``"global"``: all heads of all layers share. The total is always exact. With ``"layer"`` and
        ``"global"`` the layers of the DynamicCache in use become :class:`~kvpress_moe.cache.RaggedLayer` at the end of
        the prefill, and the memory of every evicted pair is freed. Both need scores that can be compared across heads:
        those of trained routers, or of one expert such as ``experts=["expected_attention"]``, whose scores are then
        used unchanged. ``None``: ``"global"`` with trained routers, unless attention is eager or ``track_misses`` is
        on, which do not support it; otherwise ``"uniform"``. See :attr:`scope`.
    min_share : float, default=0.2
        Where heads share a budget, each head keeps at least this share of the mean number of pairs. Without
        ``precision``, if this is less than 40 pairs, it is twice as many, but at most 40.
    precision : "mixed" or list of (int, int), optional
        Bits of keys and values. ``None``: pairs that stay are stored as the model wrote them. ``"mixed"``: each pair
        gets its own precision of :data:`kvpress_moe.codes.precision.MIXED` (with key transforms, which the routers of
        ``kvpress-moe train`` have, of ``MIXED_TRANSFORMED``), or is evicted. A list of (key bits, value
        bits) is a menu of your own, for example ``[(8, 4)]``; 16 stands for "as the model wrote it". With a precision,
        ``compression_ratio`` is the share of *bytes* to remove, against the cache in the model's type, and the layers
        of the DynamicCache in use become :class:`~kvpress_moe.cache.PackedLayer`, whatever ``budget`` is.

    max_kl : float, optional
        The mean KL divergence, in nats, of the compressed cache's answers from the full cache's that must not be
        exceeded. Each prompt then keeps as few bytes (or pairs, without a precision) as its estimate allows, and
        ``compression_ratio`` is not used. Needs routers that were calibrated for the precision, see ``kvpress-moe
        calibrate``; those that ship for SmolLM2 were, for ``"mixed"`` and ``None``.
    confidence : float, default=0.9
        Share of the prompts like those of the calibration for which the bound must hold.
    max_bytes, min_bytes : int, optional
        Hard bounds on the bytes that the pairs of each row would take in a 16-bit cache, in the layers that are
        compressed. Only with ``max_kl``. If ``max_bytes`` is too small for the promise, a warning says so.

    Raises
    ------
    SettingError
        If a setting is wrong. It is a ``ValueError``, and it is raised as soon as the setting is set. Whether the
        routers can promise ``max_kl`` is checked as soon as the press sees the model.

    Notes
    -----
    Batches padded on the left are processed row by row. Each row is routed, ranked and budgeted as if it were alone,
    and the layers become ragged under every ``budget``. In the statistics each row counts as a call.

    Cache feedback is state: what the first call counts changes the routing of the second call. ``del press.routers``
    forgets it. With ``cache_aware=False``, and with ``max_kl``, it is not used.
    """

    compression_ratio: float | None = 0.5
    num_experts: int = following(number_of_experts)
    top_k: int = following(default_top_k)
    capacity_factor: float = 1.5
    dropout: float = 0.1
    router_type: str = "pikv"
    cache_aware: bool = True
    aux_loss_weight: float = 0.01
    experts: str | Iterable[Any] | None = None
    router: str | Path | Routers | None = None
    track_misses: bool = False
    budget: str | None = None
    min_share: float = 0.2
    precision: str | Iterable[Any] | None = None
    max_kl: float | None = None
    confidence: float = 0.9
    max_bytes: int | None = None
    min_bytes: int | None = None

    _experts: list[Expert] = field(init=False, repr=False, compare=False)
    _routers: Routers | None = field(default=None, init=False, repr=False, compare=False)
    _memory: RoutingMemory = field(default_factory=RoutingMemory, init=False, repr=False, compare=False)
    _feedback: Feedback = field(default_factory=Feedback, init=False, repr=False, compare=False)
    _session: Session = field(default_factory=Session, init=False, repr=False, compare=False)
    _shared: SharedBudget = field(default_factory=SharedBudget, init=False, repr=False, compare=False)
    _shared_bytes: SharedBytes = field(default_factory=SharedBytes, init=False, repr=False, compare=False)
    _keep_fractions: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # by row
    _eager: bool = field(default=False, init=False, repr=False, compare=False)

    # ── a model and its routers ──────────────────────────────────────────────────────────────────────────────────────

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """
        Check the model, let the experts prepare themselves, and build or load the routers.

        Raises
        ------
        UnsupportedModelError, CheckpointError, SettingError
            If the model, the routers or a setting cannot be used. No hook has been registered then.
        """
        teach_kvpress()
        check_model(model)
        self._eager = attn_implementation(model) == "eager"
        attention = language_model(model).layers[0].self_attn
        if self.router is None and self._routers is not None and not belong(self._routers, attention):
            del self.routers  # shipped for another model of this size, or with its feedback
        routers = self._routers_for(attention)
        check_attention(self._eager, self._experts, self.budget, self.precision, self.max_kl)
        for expert in self._experts:
            if isinstance(expert.scorer, ScorerPress):
                expert.scorer.post_init_from_model(model)
        if self.router is not None:  # each time: the next model may be another one of the same size
            check_routers(routers, self.router_type, self._expert_names, attention, self.router)
        if self.max_kl is not None:
            self._find_promise()
        if not routers.config.trained and self.num_experts > 1:  # one expert needs no routing
            warn_untrained()

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """
        Compress every prompt that is prefilled inside the ``with`` block.

        This is kvpress's own context manager with additions, see :class:`~kvpress_moe.press.session.Session`: inputs
        that would be compressed wrongly are refused before the first layer runs, and a pass that fails leaves nothing.

        Raises
        ------
        UnsupportedInputError
            If this press is already in use, or another MoERouterPress is in use on this model.
        """
        check_model(model)
        with self._session.open(self, model, super().__call__(model)):
            yield

    @property
    def routers(self) -> Routers | None:
        """The routers in use, one per layer. None before the first use. ``del press.routers`` frees them."""
        return self._routers

    @routers.deleter
    def routers(self) -> None:
        self._routers = None
        self._memory = RoutingMemory()
        self._feedback.forget_evicted()

    def _routers_for(self, attention: nn.Module) -> Routers:
        """The routers of the model that an attention layer belongs to. They are built or loaded at the first use."""
        if self._routers is None or not fits(self._routers, attention):
            may_ship = self._follows_routers and self.router_type == "pikv"
            trained = find_trained(self.router, attention, may_ship)
            self._follow(trained)
            settings = (self.router_type, self._expert_names, self.dropout, self._uses_feedback)
            self._routers = activate(trained, self.router, *settings, attention)
        return self._routers

    # ── the data flow ────────────────────────────────────────────────────────────────────────────────────────────────

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: Any
    ) -> Tensor:
        """Route, then mix the experts' scores: (B, H, S), higher = keep. Wrappers of kvpress call only this method."""
        check_wrapped(module, self.compression_ratio, self.precision, self.max_kl)
        call = LayerCall(module, hidden_states, keys, values, attentions, kwargs)
        routing = self.route(call)
        scores = self.mix(call, routing)
        check_finite(call, routing, scores)
        return scores.clone(memory_format=torch.contiguous_format)  # wrappers write into scores

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Score all pairs, keep the best within the budget in their original order, and record what this cost."""
        if self._keeps_everything or slides(module.config, module.layer_idx):
            return keys, values
        if is_in_use(self):
            check_unmasked(module, self)
        elif self.max_kl is not None:
            check_wrapped(module, self.compression_ratio, self.precision, self.max_kl)
        keys, values = keys.to(hidden_states.device), values.to(hidden_states.device)  # a cache may offload them
        projected = self._session.projections.of(module, hidden_states)
        call = LayerCall(module, hidden_states, keys, values, attentions, kwargs, projected=projected)

        rows = self._session.rows(call)  # one call per row of a padded batch, else the call itself
        routed = [self.route(row) for row in rows]
        scores = [self.mix(row, routing) for row, routing in zip(rows, routed, strict=True)]
        observed = [self.observe(row, routing) for row, routing in zip(rows, routed, strict=True)]
        check_all_finite(rows, routed, scores, observed)
        n_kept = [self.n_kept(row, routing) for row, routing in zip(rows, routed, strict=True)]
        if self.precision is not None:
            return self._pack(call, rows, routed, scores, observed, n_kept)
        if self._session.turns_ragged(self):
            return self._evict_shared(call, scores, observed, n_kept)
        return self._evict(call, routed[0], scores[0], observed[0], n_kept[0])

    @torch.no_grad()
    def route(self, call: LayerCall) -> Routing:
        """Decide which experts judge which pair."""
        if first_to_compress(call.module):
            check_mask(call.kwargs.get("attention_mask"))  # a wrapper or the caller may have made one
        hidden_states = call.hidden_states
        router = self._routers_for(call.module).place(call.layer_idx, hidden_states.device, hidden_states.dtype)
        output = router(hidden_states, self.top_k, self.capacity_factor)
        weights = self._memory.align(call, output.weights)
        active = active_experts(call, weights, output.logits)
        self._feedback.add_routing(call.layer_idx, output)
        return Routing(router, weights, tuple(active))

    @torch.no_grad()
    def mix(self, call: LayerCall, routing: Routing) -> Tensor:
        """Mixed score (B, H, S) of the experts that judge at least one pair."""
        return mix_experts(call, routing, self._experts, self.compression_ratio)

    def observe(self, call: LayerCall, routing: Routing) -> Observation:
        """The routing and the attention of a call, which :meth:`record` needs later."""
        return observe(call, routing)

    def n_kept(self, call: LayerCall, routing: Routing) -> int:
        """
        Number of pairs that each head keeps. If heads share a budget: the mean over the heads.

        With ``compression_ratio=None`` the kept share is the sum over experts of usage share × own keep fraction. The
        first compressed layer of the prompt decides it by its routing. All layers then keep the same number, because
        transformers' masks need layers of equal length.
        """
        if self.compression_ratio is not None:
            return int(compute_n_kept(call.k_len, self.compression_ratio))
        if first_to_compress(call.module):
            keeps = [expert.keep_fraction(call.k_len) for expert in self._experts]
            self._keep_fractions[call.row] = mixed_keep_fraction(routing.routed.sum((0, 1, 2)).tolist(), keeps)
        return pairs_kept(call.k_len, self._keep_fractions[call.row])

    def _evict(
        self, call: LayerCall, routing: Routing, scores: Tensor, observation: Observation, n_kept: int
    ) -> tuple[Tensor, Tensor]:
        """Uniform budget: every head keeps the same number of pairs. Returns the smaller keys and values."""
        indices = select(scores, n_kept)
        self.record(call.layer_idx, observation, kept_mask(indices, call.k_len))
        if self.track_misses:
            self._feedback.keep_evicted(call, routing, indices)
        if call.cache is not None:
            fit_masks(call.cache, call.module.config)
        if not is_in_use(self):  # a wrapper may compress this cache again, and counts its pairs
            self._memory.remember(call, routing.weights, indices)
        elif call.cache is not None:
            shorten(call.cache.layers[call.layer_idx], call.q_len - n_kept, call.q_len)
        return evict(call.keys, indices), evict(call.values, indices)

    def _evict_shared(
        self, call: LayerCall, scores: Sequence[Tensor], observed: Sequence[Observation], n_kept: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Shared budget: heads compete. Once it is decided, the layers of the cache are replaced by ragged ones."""
        floor = partial(least_pairs, min_share=self.min_share)

        def pairs_of(part: int, waiting: Mapping[int, Tensor]) -> int:
            if self.max_kl is None:
                return n_kept[part]
            return self._promised_pairs(waiting, call.keys.shape[-1])

        for layer_idx, parts in evict_shared(
            self._shared, call, scores, observed, pairs_of, self.scope, floor, not is_in_use(self)
        ):
            for kept, observation in parts:
                self.record(layer_idx, observation, kept)
        return call.keys, call.values  # kvpress's hook stores them in the old layer object, which is no longer in use

    def record(self, layer_idx: int, observation: Observation, kept: Tensor) -> None:
        """Count what each expert's tokens lost if only the pairs ``kept`` (B, H, S) stay, and tell the router."""
        self._feedback.add_eviction(layer_idx, observation, kept, self._routers)

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """kvpress's hook. With ``track_misses`` it also counts a decoding step's attention to evicted keys."""
        if self._session.is_copied and self.forward_hook in module._forward_hooks.values():
            return output
        kwargs = attention_arguments(module, kwargs)
        output = super().forward_hook(module, input, kwargs, output)
        self._session.projections.clear()
        if self.track_misses and not is_prefilling(kwargs["cache_position"], kwargs["hidden_states"].shape[1]):
            self._feedback.add_decoding_step(module, kwargs, self._routers)
        return output

    def get_stats(self) -> dict[str, Any]:
        """What was counted since the last reset, see :meth:`kvpress_moe.press.statistics.RoutingStats.as_dict`."""
        return self._feedback.stats.as_dict(self.num_experts)

    def reset_stats(self) -> None:
        """Forget what was counted. The routers and their running hit rates stay."""
        self._feedback.stats.reset()
