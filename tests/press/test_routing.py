"""Routing is the result of `route`, never changed afterwards; training and the press mix by the same function."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.experts import mixing
from kvpress_moe.experts.layer_call import LayerCall
from kvpress_moe.experts.mixing import ranks_of
from kvpress_moe.training.layerwise import predict
from tests.tiny import calibrated_routers, tokens


class Watching(MoERouterPress):
    """Keeps every call with its routing and its mixed scores."""

    def mix(self, call, routing):
        mixed = super().mix(call, routing)
        self.__dict__.setdefault("seen", []).append((call, routing, mixed))
        return mixed


@pytest.fixture
def press(llama):
    return Watching(0.5, router=calibrated_routers(llama))


@torch.no_grad()
def mixed_by_press(llama, press):
    press.seen = []
    with press(llama):
        llama.model(input_ids=tokens(60), past_key_values=DynamicCache())
    return press.seen


def fitted(press, call):
    """The scores (H, S) that training computes of a call's tokens."""
    router = press.routers.layers[call.layer_idx]
    experts = list(press.expert_strategies.values())
    learned = experts.index("learned")
    others = [index for index in range(len(experts)) if index != learned]
    ranks = torch.zeros(call.k_len, call.keys.shape[1], len(experts))  # (S, H, E)
    ranks[..., others] = ranks_of(lambda i: press._experts[i].score(call, 0.5), others)[0].permute(2, 1, 0)
    return predict(router, call.hidden_states[0], ranks, len(experts), learned)[0].T


def test_training_and_the_press_give_the_same_scores_and_change_together(llama, press, monkeypatch):
    press.top_k = 3
    press.cache_aware = False
    for layer in press.router.layers:  # training mixes the tokens of many prompts, which have no distance
        torch.nn.init.zeros_(layer.calibration.decay)
    seen = mixed_by_press(llama, press)
    before = [(mixed[0], fitted(press, call)) for call, _, mixed in seen]
    for mixed, trained in before:
        assert_close(mixed, trained.detach(), atol=1e-5, rtol=1e-4)

    original = mixing.mix_calibrated
    monkeypatch.setattr(mixing, "mix_calibrated", lambda *arguments: 3 * original(*arguments) + 1)
    for (mixed, trained), (call, _, changed) in zip(before, mixed_by_press(llama, press), strict=True):
        assert_close(changed[0], 3 * mixed + 1, atol=1e-4, rtol=1e-4)
        assert_close(fitted(press, call), 3 * trained + 1, atol=1e-4, rtol=1e-4)


def test_routing_is_frozen_and_tells_who_judges_which_pair(llama, press):
    for _, routing, _ in mixed_by_press(llama, press):
        with pytest.raises(FrozenInstanceError):
            routing.weights = None
        assert_close(routing.weights.sum(-1), torch.ones(routing.weights.shape[:-1]))
        assert torch.equal(routing.routed, routing.weights > 0)
        assert list(routing.active) == routing.routed.flatten(0, 2).any(0).nonzero().flatten().tolist()


def test_a_call_holds_nothing_that_a_later_stage_fills_in(llama, press):
    call, *_ = mixed_by_press(llama, press)[0]
    assert {"weights", "router", "ranks", "active", "routed"}.isdisjoint(vars(call))
    assert isinstance(call, LayerCall)
