"""Settings that follow others: what was named stays, what was not named follows the experts and the routers in use."""

import copy
import pickle
from dataclasses import dataclass, fields, replace

import pytest

from kvpress_moe import MoERouterPress, SettingError
from tests.tiny import calibrated_routers, prefill, tokens


@dataclass
class SixExperts(MoERouterPress):
    num_experts: int = 6
    top_k: int = 3


def test_a_subclass_may_name_other_defaults_and_they_are_checked_like_any_setting(llama):
    press = SixExperts()
    assert (press.num_experts, press.top_k, len(press.expert_strategies)) == (6, 3, 6)
    assert (SixExperts(num_experts=5).num_experts, SixExperts(top_k=1).top_k) == (5, 1)
    with pytest.raises(SettingError, match=r"^top_k: got 7, expected at most num_experts = 6"):
        press.top_k = 7
    press.experts = ["knorm", "tova", "keydiff"]
    assert press.num_experts == 3
    prefill(llama, tokens(40), SixExperts(0.5))


def test_the_numbers_are_those_of_the_experts_in_use():
    press = MoERouterPress()
    assert (press.num_experts, press.top_k) == (4, 2)
    press.experts = ["knorm", "tova", "keydiff"]
    assert (press.num_experts, press.top_k) == (3, 2)
    press.experts = None
    assert (press.num_experts, press.top_k) == (4, 2)
    assert MoERouterPress(experts=["knorm"]).top_k == 1
    press.top_k = 3
    press.num_experts = 5
    press.top_k = None
    assert (press.num_experts, press.top_k) == (5, 2)
    press.num_experts = None
    assert press.num_experts == 4


def test_what_was_not_named_follows_trained_routers_and_goes_back_without_them(llama):
    routers = calibrated_routers(llama)  # three experts
    press = MoERouterPress(0.5, router=routers)
    prefill(llama, tokens(40), press)
    assert list(press.expert_strategies.values()) == list(routers.config.experts)
    assert press.top_k == routers.config.top_k
    press.router = None
    prefill(llama, tokens(40), press)
    assert (press.num_experts, press.top_k) == (4, 2)


def test_setting_a_number_to_what_it_is_changes_nothing(llama):
    press = MoERouterPress(0.5, router=calibrated_routers(llama))
    prefill(llama, tokens(40), press)
    before = press.routers
    for name in ("num_experts", "compression_ratio", "min_share"):
        setattr(press, name, getattr(press, name))
    assert press.routers is before


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda press: pickle.loads(pickle.dumps(press))])
def test_copies_keep_what_was_named(again):
    press = again(MoERouterPress(0.7, num_experts=5, top_k=3, budget="layer"))
    assert press == MoERouterPress(0.7, num_experts=5, top_k=3, budget="layer")
    with pytest.raises(SettingError, match="^budget"):
        press.budget = "everywhere"


def test_repr_and_replace_show_the_numbers_in_force():
    press = MoERouterPress(experts=["knorm", "tova"])
    assert "num_experts=2, top_k=2" in repr(press)
    assert replace(press, compression_ratio=0.9).num_experts == 2
    assert {field.name for field in fields(press) if field.init} >= {"num_experts", "top_k", "experts"}


def test_a_refused_setting_leaves_the_press_as_it_was():
    press = MoERouterPress(track_misses=True)
    with pytest.raises(SettingError, match="^track_misses"):
        press.budget = "global"
    assert press.budget is None
    with pytest.raises(SettingError, match="^experts"):
        press.experts = ["nobody"]
    assert list(press.expert_strategies.values())[:1] == ["aggressive"]
