"""MoERouterPress: hidden states in, smaller cache out. This file names every stage in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from kvpress import ScorerPress
from kvpress.presses.base_press import is_prefilling
from kvpress.utils import compute_n_kept, extract_keys_and_values
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvpress_moe.budget.allocation import mixed_keep_fraction, pairs_kept
from kvpress_moe.budget.cross_layer import Observation, SharedBudget
from kvpress_moe.budget.eviction import evict, kept_mask, select
from kvpress_moe.budget.hit_rates import mass_by_expert, pairs_by_expert
from kvpress_moe.cache import RaggedLayer
from kvpress_moe.cache.masks import fit_masks, fit_masks_after_forward
from kvpress_moe.errors import ExpertError, SettingError, UnsupportedModelError
from kvpress_moe.experts.custom import score_selection
from kvpress_moe.experts.expert_list import ExpertStrategies
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import mix, mix_calibrated, ranks_of
from kvpress_moe.experts.registry import Expert, OwnExpert, expert_specs, make_expert
from kvpress_moe.model.attention import per_kv_head
from kvpress_moe.model.layers import (
    check_can_serve_padding,
    check_can_turn_ragged,
    check_forward,
    check_mask,
    check_model,
    check_still_there,
    check_unmasked,
    first_to_compress,
    forward_arguments,
    language_model,
    last_to_compress,
    slides,
)
from kvpress_moe.model.projection_cache import Projections
from kvpress_moe.press.evicted_keys import MissTracker
from kvpress_moe.press.exclusive_use import at_work, is_at_work
from kvpress_moe.press.nan_checks import active_experts, check_finite
from kvpress_moe.press.padding import join_rows, rows_alone, text_starts
from kvpress_moe.press.routing_memory import RoutingMemory
from kvpress_moe.press.settings import CHECKS, Default, check_number_of_experts, check_top_k_fits, check_tracking
from kvpress_moe.press.statistics import RoutingStats
from kvpress_moe.press.transaction import Reading
from kvpress_moe.routers import RouterConfig, Routers
from kvpress_moe.routers.calibration import LearnedExpert
from kvpress_moe.routers.checkpoint import save_routers
from kvpress_moe.routers.resolve import (
    belong,
    check_routers,
    fits,
    shipped_routers,
    trained_routers,
    untrained_routers,
    warn_untrained,
)

DEFAULT_EXPERTS, DEFAULT_TOP_K = 4, 2  # the guide's
N_SINK = 4  # first tokens that hit rates leave out


@dataclass
class MoERouterPress(ScorerPress):  # type: ignore[misc]
    """
    A mixture-of-experts router over compression experts.

    Each layer's router decides for every token of the prompt which experts judge its KV pairs. An expert gives every
    pair a score; scores are made comparable (rank within the head), mixed by the router's weights, and the best
    ``1 - compression_ratio`` of the pairs of each head stay, in their original order. Only the prompt is compressed,
    once.

    Works wherever a kvpress ``ScorerPress`` works: ``with press(model): model.generate(...)``, the
    ``kv-press-text-generation`` pipeline, and inside kvpress's wrappers, which need a number for ``compression_ratio``.

    Parameters
    ----------
    compression_ratio : float or None, default=0.5
        Share of the KV pairs to remove, in [0, 1); exact for each layer and head
        (``kvpress.utils.compute_n_kept``). ``None``: each expert's own keep fraction decides, see :meth:`n_kept`.
    num_experts : int, default=4
        Experts to choose from: the first of the guide's table, up to 8. With ``experts`` it follows their number.
    top_k : int, default=2
        Experts that judge a token. Where ``num_experts`` is 1, the default becomes 1.
    capacity_factor : float, default=1.5
        An expert takes at most ``ceil(capacity_factor * tokens * top_k / num_experts)`` tokens of a prompt, at least 1.
    dropout : float, default=0.1
        Dropout inside the routers, in training mode only.
    router_type : {"pikv", "base"}, default="pikv"
        ``"pikv"`` listens to the experts' hit rates, ``"base"`` does not.
    cache_aware : bool, default=True
        ``False`` makes a ``"pikv"`` router behave exactly like a ``"base"`` one.
    aux_loss_weight : float, default=0.01
        Scale of the load-balancing loss when routers are trained.
    experts : str or sequence, optional
        ``"guide"``, ``"strong"``, or a list of names, kvpress scorers and functions with the signature of ``score``.
    router : path, str or Routers, optional
        Trained routers: a directory, a hub id, or the object. ``None`` takes those that ship with the package for this
        very model, if there are any and neither ``experts`` nor ``num_experts`` was named; else untrained ones, which
        weigh all experts alike until cache feedback moves them. Where no experts are named, they are the ones that the
        trained routers know.

    track_misses : bool, default=False
        Keep evicted keys on the CPU, and count hit rates with every generated token too, not only with the prompt's
        last window. Costs memory there and time at each step.
    budget : {"uniform", "layer", "global"}, optional
        Who shares: nobody (every head keeps as many), the heads of a layer, or all heads of all layers. Always exact in
        total. With ``"layer"`` and ``"global"`` the layers of the DynamicCache in use turn into
        :class:`~kvpress_moe.cache.RaggedLayer` at the end of the prefill, and memory is freed pair by pair. Both need
        scores that compare across heads: those of trained routers, or of one expert such as
        ``experts=["expected_attention"]``, whose scores are then used as they are. Ranks of an untrained mixture do not
        compare; heads then keep nearly equal numbers. ``None``: ``"global"`` with trained routers (unless attention is
        eager or ``track_misses`` is on, which cannot serve it), ``"uniform"`` otherwise; see :attr:`scope`.
    min_share : float, default=0.2
        Share of the mean that each head keeps at least, where heads compete.

    Raises
    ------
    SettingError
        A ``ValueError``; at once, for any setting that is wrong.

    Notes
    -----
    Batches padded on the left are served row by row: each row is routed, ranked and budgeted as if it were alone, and
    the layers turn ragged under every ``budget``. In the statistics each row counts as a call.

    Cache feedback is state: a second call routes by what the first one saw. ``del press.routers`` forgets it,
    ``cache_aware=False`` does without.
    """

    compression_ratio: float | None = 0.5
    num_experts: int = Default(DEFAULT_EXPERTS)
    top_k: int = Default(DEFAULT_TOP_K)
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

    _experts: list[Expert] = field(default_factory=list, init=False, repr=False, compare=False)
    _routers: Routers | None = field(default=None, init=False, repr=False, compare=False)
    _stats: RoutingStats = field(default_factory=RoutingStats, init=False, repr=False, compare=False)
    _memory: RoutingMemory = field(default_factory=RoutingMemory, init=False, repr=False, compare=False)
    _misses: MissTracker = field(default_factory=MissTracker, init=False, repr=False, compare=False)
    _projections: Projections = field(default_factory=Projections, init=False, repr=False, compare=False)
    _keep_fractions: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)  # by row
    _text_starts: list[int] | None = field(default=None, init=False, repr=False, compare=False)
    _shared: SharedBudget = field(default_factory=SharedBudget, init=False, repr=False, compare=False)
    _eager: bool = field(default=False, init=False, repr=False, compare=False)
    _open: bool = field(default=False, init=False, repr=False, compare=False)
    _open_top_k: bool = field(default=False, init=False, repr=False, compare=False)
    _ready: bool = field(default=False, init=False, repr=False, compare=False)

    # ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def __post_init__(self) -> None:
        specs = expert_specs(self.experts, self.num_experts)
        if self.experts is None or not isinstance(self.num_experts, Default):
            check_number_of_experts(self.num_experts, len(specs), given=self.experts is not None)
        self._experts = self._make_experts(specs)
        self._open = self.experts is None and isinstance(self.num_experts, Default)
        self._open_top_k = isinstance(self.top_k, Default)
        self.num_experts = len(specs)
        self.top_k = min(2, self.num_experts) if isinstance(self.top_k, Default) else self.top_k
        check_top_k_fits(self.top_k, self.num_experts)
        check_tracking(self.track_misses, self.budget)
        self._ready = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in CHECKS:
            CHECKS[name](value)
        if name == "experts" and value is not None and not isinstance(value, str):
            value = tuple(value)
        if self.__dict__.get("_ready"):
            self._before_change(name, value)
        super().__setattr__(name, value)

    def _before_change(self, name: str, value: Any) -> None:
        """Bring what was derived from a setting in line with its new value; raise before anything has changed."""
        if name == "top_k":
            check_top_k_fits(value, self.num_experts)
            self._open_top_k = False
        elif name == "num_experts" and value != self.num_experts:
            specs = expert_specs(self.experts, value)
            check_number_of_experts(value, len(specs), given=self.experts is not None)
            self._set_experts(specs)
        elif name == "experts":
            self._set_experts(expert_specs(value, self.num_experts))
        elif name == "budget":
            check_tracking(self.track_misses, value)
        elif name == "track_misses":
            check_tracking(value, self.budget)
        elif name in ("router", "router_type"):
            del self.routers
        elif name in ("cache_aware", "dropout"):
            self._apply_to_routers(name, value)

    @property
    def expert_strategies(self) -> ExpertStrategies:
        """Index -> name of the expert, readable and writable: ``press.expert_strategies[0] = "ultra_aggressive"``."""
        return ExpertStrategies(lambda: [expert.name for expert in self._experts], self._replace_expert)

    @expert_strategies.setter
    def expert_strategies(self, strategies: Mapping[int, object]) -> None:
        if set(strategies) != set(range(self.num_experts)):
            raise SettingError(
                "expert_strategies",
                dict(strategies),
                f"one entry for each of the {self.num_experts} experts, numbered from 0",
                "Set num_experts first, or change single entries.",
            )
        self.experts = [strategies[index] for index in range(self.num_experts)]

    def _replace_expert(self, index: int, given: object) -> None:
        self.experts = [given if i == index else expert.spec for i, expert in enumerate(self._experts)]

    def _set_experts(self, specs: Sequence[Any]) -> None:
        """Judge by other experts. Routers and counts belong to the old ones and start anew."""
        experts = self._make_experts(specs)
        check_top_k_fits(self.top_k, len(experts))
        self._open = False
        self._exchange_experts(experts)
        del self.routers

    def _exchange_experts(self, experts: list[Expert]) -> None:
        self._experts = experts
        self.__dict__["num_experts"] = len(experts)
        self.reset_stats()

    def _adopt(self, config: RouterConfig | None) -> None:
        """Judge by the experts that trained routers know; ``None``: by the guide's again. Where the user named none."""
        names = config.experts if config is not None else expert_specs(None, DEFAULT_EXPERTS)
        if tuple(names) != tuple(self.expert_strategies.values()):
            self._exchange_experts(self._make_experts(names))
        if self._open_top_k:
            self.__dict__["top_k"] = config.top_k if config is not None else DEFAULT_TOP_K

    def _make_experts(self, specs: Sequence[Any]) -> list[Expert]:
        if not specs:
            raise SettingError("experts", specs, "at least one expert", "None takes the guide's.")
        return [self._make_expert(spec) for spec in specs]

    def _make_expert(self, given: Any) -> Expert:
        """An expert as given; unknown names go to ``_apply_expert_compression`` where a subclass overrides it."""
        overridden = type(self)._apply_expert_compression is not MoERouterPress._apply_expert_compression
        try:
            return make_expert(given)
        except SettingError:
            if not (overridden and isinstance(given, str)):
                raise
        return OwnExpert(given, partial(self._score_custom, given), registered=True)

    # ── model ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """
        Check the model, let the experts prepare themselves, and have the routers ready.

        Raises
        ------
        UnsupportedModelError, CheckpointError, SettingError
            Before any hook is registered.
        """
        check_model(model)
        self._eager = model.config._attn_implementation == "eager"
        attention = language_model(model).layers[0].self_attn
        if self.router is None and self._routers is not None and not belong(self._routers, attention):
            del self.routers  # shipped ones, or feedback, of another model of this size
        routers = self._routers_for(attention)
        for expert in self._experts:
            if expert.name == "observed_attention" and model.config._attn_implementation != "eager":
                raise SettingError(
                    "experts",
                    expert.name,
                    "a model with eager attention, the only one that returns attention weights",
                    "Load it with attn_implementation='eager'.",
                )
            if isinstance(expert.scorer, ScorerPress):
                expert.scorer.post_init_from_model(model)
        if self.budget not in (None, "uniform") and model.config._attn_implementation == "eager":
            raise SettingError(
                "budget",
                self.budget,
                "'uniform' with eager attention, which transformers does not let others replace",
                "Load the model with attn_implementation='sdpa'.",
            )
        if self.router is not None:
            self._check_routers(routers, attention)  # also when they are there: another model may be of the same size
        if not routers.config.trained and self.num_experts > 1:  # one expert needs no routing
            warn_untrained()

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """
        Compress every prompt that is prefilled inside the ``with`` block.

        kvpress's own context manager, which owns the compression hooks, plus three things: inputs that a press would
        compress wrongly without a word are refused before the first layer runs, a prompt that fails is undone (see
        :class:`kvpress_moe.press.transaction.Reading`), and the ``rotary_emb`` that kvpress puts on the attention layers is taken
        off again.

        Raises
        ------
        UnsupportedInputError
            If this press or another MoERouterPress on this model is at work already.
        """
        check_model(model)
        reading = Reading(self._checkpoint)
        with ExitStack() as leave:  # undoes all that was done, whatever happens in between
            leave.enter_context(at_work(self, model))
            leave.callback(self._projections.clear)
            leave.callback(setattr, self, "_text_starts", None)
            for layer in language_model(model).layers:
                if not hasattr(layer.self_attn, "rotary_emb"):
                    leave.callback(layer.self_attn._modules.pop, "rotary_emb", None)
            leave.enter_context(super().__call__(model))
            before = partial(self._before_forward, reading)
            leave.callback(model.model.register_forward_pre_hook(before, with_kwargs=True).remove)
            leave.callback(model.model.register_forward_hook(fit_masks_after_forward).remove)
            leave.callback(model.model.register_forward_hook(reading.end, always_call=True).remove)
            leave.callback(reading.close)
            self._projections.watch(model, leave)
            yield

    @property
    def _at_work(self) -> bool:
        """Whether a ``with`` block of this press is open; otherwise a wrapper calls it."""
        return is_at_work(self)

    def _checkpoint(self, is_prompt: bool) -> Callable[[], None]:
        """What takes back all that is counted in the forward pass that begins now."""
        if not (is_prompt or self.track_misses):
            return lambda: None  # nothing is counted
        routers, counted = self._routers, self._stats.snapshot()
        feedback = [] if routers is None else list(routers.buffers())

        def take_back() -> None:
            self._stats.restore(counted)
            if routers is None:  # they had been dropped, and were built anew in this pass
                self._routers = None
            else:
                for rates, before in zip(routers.buffers(), feedback, strict=True):
                    rates.copy_(before)
            self._shared.clear()
            self._projections.clear()

        return take_back

    def _before_forward(
        self, reading: Reading, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Refuse what would be compressed wrongly without a word, and note where the text of padded rows begins."""
        arguments = forward_arguments(model, args, kwargs)
        reading.begin(arguments)
        self._text_starts = None
        if check_forward(model, arguments) and self.compression_ratio != 0:
            self._text_starts = text_starts(arguments.get("attention_mask"), arguments.get("position_ids"))
            if self._text_starts is not None:
                check_can_serve_padding(arguments.get("past_key_values"), self._eager, self.track_misses)

    @property
    def routers(self) -> Routers | None:
        """The routers in use, one per layer; None before the first use. ``del press.routers`` frees them."""
        return self._routers

    @routers.deleter
    def routers(self) -> None:
        self._routers = None
        self._memory = RoutingMemory()
        self._misses = MissTracker()

    def _routers_for(self, attention: nn.Module) -> Routers:
        """The routers of the model that an attention layer belongs to, built or loaded at the first use."""
        if self._routers is None or not fits(self._routers, attention):
            with torch.inference_mode(False):  # else their averages could not be updated outside inference mode
                routers = trained_routers(self.router) if self.router is not None else None
                if routers is None and self._open and self.router_type == "pikv":
                    routers = shipped_routers(attention)
                if self._open:
                    self._adopt(routers.config if routers is not None else None)
                if routers is None:
                    names = list(self.expert_strategies.values())
                    routers = untrained_routers(self.router_type, names, self.dropout, attention)
                self._check_routers(routers, attention)
            self._routers = routers
            self._apply_to_routers("cache_aware", self.cache_aware)
            self._apply_to_routers("dropout", self.dropout)
        return self._routers

    @classmethod
    def from_pretrained(cls, router: str | Path | Routers, **settings: Any) -> MoERouterPress:
        """
        A press with trained routers.

        Parameters
        ----------
        router : path, str or Routers
            A directory, a hub id (``"user/name"``), or the object.
        **settings
            Of the press. Experts and ``top_k`` are those of the routers unless named.
        """
        return cls(router=trained_routers(router), **settings)

    def save_pretrained(self, directory: str | Path, metrics: dict[str, Any] | None = None) -> Path:
        """
        Write the routers in use to a directory, see :func:`kvpress_moe.routers.checkpoint.save_routers`.

        Raises
        ------
        SettingError
            If there are none yet: the press has seen no model.
        """
        routers = self._routers if self._routers is not None else self.router
        if not isinstance(routers, Routers):
            raise SettingError("routers", None, "routers in use", "Enter `with press(model):` once, or pass router=.")
        return save_routers(routers, directory, metrics)

    def push_to_hub(self, repo_id: str, private: bool = False, metrics: dict[str, Any] | None = None) -> str:
        """
        Upload the routers in use to a repository of the Hugging Face hub, which is made if need be; its address.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, metrics)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Routers for MoERouterPress")
        return str(address)

    @property
    def scope(self) -> str:
        """Who shares the budget: ``budget`` where it was set; else what the routers in use allow."""
        if self.budget is not None:
            return self.budget
        calibrated = self._routers is not None and bool(self._routers.config.num_heads)
        return "global" if calibrated and not self.track_misses and not self._eager else "uniform"

    @property
    def _turns_ragged(self) -> bool:
        """Whether layers turn ragged; inside a wrapper, which stores equal heads, only if ``budget`` asks for it."""
        shares = self.scope != "uniform" and (self._at_work or self.budget is not None)
        return shares or self._text_starts is not None

    def _check_routers(self, routers: Routers, attention: nn.Module) -> None:
        check_routers(
            routers, self.router_type, list(self.expert_strategies.values()), attention, cast(Any, self.router)
        )

    def _apply_to_routers(self, name: str, value: Any) -> None:
        for router in self._routers.layers if self._routers is not None else ():
            if name == "dropout":
                router.dropout.p = value
            elif name == "cache_aware" and hasattr(router, "cache_aware"):
                router.cache_aware = value

    # ── the data flow ────────────────────────────────────────────────────────────────────────────────────────────────

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: Any
    ) -> Tensor:
        """Route, then mix the experts' scores: (B, H, S), higher = keep."""
        if self.compression_ratio is None:
            raise SettingError(
                "compression_ratio",
                None,
                "a number inside a kvpress wrapper, which reads the budget from it",
                "Set press.compression_ratio, or use MoERouterPress without a wrapper.",
            )
        if slides(module.config, module.layer_idx):
            raise UnsupportedModelError(
                f"model: layer {module.layer_idx} has sliding-window attention, expected layers with full attention "
                "inside this wrapper, which would evict from it. Use MoERouterPress without a wrapper."
            )
        call = LayerCall(module, hidden_states, keys, values, attentions, kwargs)
        self.route(call)
        scores = self.mix(call)
        check_finite(call, scores)
        return scores.clone(memory_format=torch.contiguous_format)  # wrappers write into scores

    def compress(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Score all pairs, keep the best within the budget in their original order, and record what that cost."""
        if self.compression_ratio == 0 or slides(module.config, module.layer_idx):
            return keys, values
        if self._at_work:
            check_unmasked(module, self)
        keys, values = keys.to(hidden_states.device), values.to(hidden_states.device)  # an offloaded cache's are away
        projected = self._projections.of(module, hidden_states)
        call = LayerCall(module, hidden_states, keys, values, attentions, kwargs, projected=projected)
        parts = rows_alone(call, self._text_starts)
        for part in parts:
            self.route(part)
        judged = [(self.mix(part), self.observe(part)) for part in parts]
        for part, (scores, observation) in zip(parts, judged, strict=True):
            check_finite(part, scores, observation.mass)
        n_kept = [self.n_kept(part) for part in parts]
        if self._turns_ragged:
            self.compress_ragged(call, judged, n_kept)
            return keys, values  # kvpress's hook stores them in the layer that was just replaced
        indices = select(scores, *n_kept)
        self.record(call.layer_idx, observation, kept_mask(indices, call.k_len))
        self.remember(call, indices)
        if call.cache is not None:
            fit_masks(call.cache, module.config)
        return evict(keys, indices), evict(values, indices)

    def compress_ragged(self, call: LayerCall, judged: list[tuple[Tensor, Observation]], n_kept: Sequence[int]) -> None:
        """
        Let heads compete for the budget, and turn layers whose pairs are decided into ragged ones.

        ``judged`` are scores and observation of the whole batch or, of a padded one, of each row; each has a budget.
        """
        check_can_turn_ragged(call.cache, call.layer_idx, inside_wrapper=not self._at_work)
        if first_to_compress(call.module):
            self._shared.clear()
        self._shared.add(call.layer_idx, judged)
        if self.scope == "global" and not last_to_compress(call.module):
            return
        layers = self._shared.decide(n_kept, 1.0 if self.scope == "uniform" else self.min_share)
        cache: Any = call.cache
        check_still_there(cache, dict.fromkeys(layers, call.k_len))
        for layer_idx, decided in layers.items():
            for kept, observation in decided:
                self.record(layer_idx, observation, kept)
            dense: Any = call if layer_idx == call.layer_idx else cache.layers[layer_idx]
            kept = join_rows([kept for kept, _ in decided], call.k_len)
            cache.layers[layer_idx] = RaggedLayer.from_dense(dense.keys, dense.values, kept)
        fit_masks(cache, call.module.config)

    @torch.no_grad()
    def route(self, call: LayerCall) -> None:
        """Decide who judges which pair: sets ``call.weights``, shape (B, 1 or H, S, E), and ``call.active``."""
        if first_to_compress(call.module):
            check_mask(call.kwargs.get("attention_mask"))  # a wrapper's, or one that was made by hand
        hidden_states = call.hidden_states
        router = self._routers_for(call.module).place(call.layer_idx, hidden_states.device, hidden_states.dtype)
        call.router = router
        output = router(hidden_states, self.top_k, self.capacity_factor)
        call.weights = self._memory.align(call, output.weights)
        call.active = active_experts(call, output.logits)
        assigned = output.chosen.sum((0, 1))  # (E,)
        n_tokens = output.chosen[..., 0].numel()
        self._stats.add(
            call.layer_idx, calls=1, tokens=n_tokens, aux_loss=output.aux_loss, assigned=assigned, used=assigned > 0
        )

    @torch.no_grad()
    def mix(self, call: LayerCall) -> Tensor:
        """Mixed score (B, H, S) of the experts that judge any pair; the others are not computed."""

        def score(index: int) -> Tensor:
            return self._experts[index].score(call, self.compression_ratio)

        calibration = call.router.calibration
        if calibration is None:
            return mix(score, call.active, call.weights)

        own = [index for index, expert in enumerate(self._experts) if expert.name == "learned"]
        listens = set(own) & set(call.active) and cast(LearnedExpert, call.router.learned).num_seen
        asked = range(self.num_experts) if listens else call.active
        ranked = [index for index in asked if index not in own]
        terms: dict[int, Tensor] = {}
        if ranked:
            call.ranks = ranks_of(score, ranked)
            terms = dict(zip(ranked, calibration.terms(call.ranks, ranked).unbind(1), strict=True))
        for index in set(own) & set(call.active):
            terms[index] = calibration.slope[:, index, None] * score(index)  # in log attention already
        active = torch.stack([terms[index] for index in call.active], dim=1)
        return mix_calibrated(active, call.active, call.weights, calibration.offset)

    def n_kept(self, call: LayerCall) -> int:
        """
        Pairs that each head keeps.

        With ``compression_ratio=None``: the sum over experts of usage share × own keep fraction, as the first
        compressed layer of the prompt routes; all layers then keep as many, since transformers' masks need layers of
        equal length.
        """
        if self.compression_ratio is not None:
            n_kept: int = compute_n_kept(call.k_len, self.compression_ratio)
            return n_kept
        if first_to_compress(call.module):
            keeps = [expert.keep_fraction(call.k_len) for expert in self._experts]
            self._keep_fractions[call.row] = mixed_keep_fraction(call.routed.sum((0, 1, 2)).tolist(), keeps)
        return pairs_kept(call.k_len, self._keep_fractions[call.row])

    @torch.no_grad()
    def observe(self, call: LayerCall) -> Observation:
        """
        What :meth:`record` needs to know of a call.

        The first four tokens are left out of the mass: they are attention sinks, which nearly every expert keeps, and
        would decide the hit rate of whichever expert they happen to be routed to.
        """
        mass = per_kv_head(call.window_mass, call.keys.shape[1])
        if call.k_len > 2 * N_SINK:
            mass = mass.clone()
            mass[..., :N_SINK] = 0
        return Observation(call.routed, mass)

    @torch.no_grad()
    def record(self, layer_idx: int, observation: Observation, kept: Tensor) -> None:
        """Count what each expert's tokens lost when only ``kept`` (B, H, S) stayed, and tell the router."""
        routed, mass = observation.routed, observation.mass
        by_expert = {
            "judged": pairs_by_expert(torch.ones_like(kept), routed),
            "kept": pairs_by_expert(kept, routed),
            "mass": mass_by_expert(mass, routed),
            "hit": mass_by_expert(mass * kept, routed),
        }
        self._stats.add(layer_idx, **by_expert)
        self._tell_router(layer_idx, by_expert["hit"], by_expert["mass"])

    def remember(self, call: LayerCall, indices: Tensor) -> None:
        """Keep what later calls on the same cache will ask for."""
        if self.track_misses:
            self._misses.keep(call, indices)
        if not self._at_work:  # a wrapper is at work and may compress this cache again
            self._memory.remember(call, indices)

    def _tell_router(self, layer_idx: int, hit: Tensor, mass: Tensor) -> None:
        cast(Routers, self._routers).layers[layer_idx].observe(hit / mass)  # 0 / 0: unknown, NaN

    def forward_hook(
        self, module: nn.Module, input: list[Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """kvpress's hook; with ``track_misses`` it then counts what a decoding step hit and missed."""
        output = super().forward_hook(module, input, kwargs, output)
        self._projections.clear()
        if self.track_misses and not is_prefilling(kwargs["cache_position"], kwargs["hidden_states"].shape[1]):
            keys, values = extract_keys_and_values(kwargs["past_key_values"], module.layer_idx)
            call = LayerCall(module, kwargs["hidden_states"], keys, values, None, kwargs)
            masses = self._misses.masses(call)
            if masses is not None:
                check_finite(call, mass=masses[1])
                self._stats.add(call.layer_idx, hit=masses[0], mass=masses[1])
                self._tell_router(call.layer_idx, *masses)
        return output

    # ── experts of a subclass ────────────────────────────────────────────────────────────────────────────────────────

    def _apply_expert_compression(
        self, keys: Tensor, values: Tensor, strategy: str, router_probs: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """
        Judge pairs by a strategy that the table of experts does not hold. For subclasses to override.

        Parameters
        ----------
        keys, values : Tensor, shape (B, H, S, D)
        strategy : str
            The name that ``experts`` or ``expert_strategies`` gave.
        router_probs : Tensor, shape (B, S, E)
            Routing weights of the tokens (mean over heads where heads differ).

        Returns
        -------
        Tensor or (Tensor, Tensor)
            A score (B, H, S), higher = keep; or the keys and values (B, H, K, D) that the strategy would keep, a
            selection of the given ones.
        """
        raise NotImplementedError

    def _score_custom(self, strategy: str, call: LayerCall) -> Tensor:
        opinion = self._apply_expert_compression(call.keys, call.values, strategy, call.weights.mean(1))
        if isinstance(opinion, tuple) and len(opinion) == 2:
            return score_selection(opinion[0], call.keys, strategy)
        if isinstance(opinion, Tensor):
            return opinion
        raise ExpertError(
            f"_apply_expert_compression returned {type(opinion).__name__} for {strategy!r}, expected a score of shape "
            "(batch, KV heads, pairs) or a tuple (keys, values)."
        )

    # ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────

    def get_stats(self) -> dict[str, Any]:
        """What was counted since the last reset, see :meth:`kvpress_moe.press.statistics.RoutingStats.as_dict`."""
        return self._stats.as_dict(self.num_experts)

    def reset_stats(self) -> None:
        """Forget what was counted. The routers and their running hit rates stay."""
        self._stats.reset()
