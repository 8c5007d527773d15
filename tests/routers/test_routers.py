"""Routers: untrained they prefer nobody, dropout acts in training only, feedback moves them, files bring them back."""

import json

import pytest
import torch
from torch.testing import assert_close

from kvpress_moe import CheckpointError, load_routers, save_routers
from kvpress_moe.routers import ROUTERS, BaseMoERouter, PiKVMoERouter, RouterConfig, Routers

HIDDEN = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))


def trained(router_class, **kwargs):
    """A router whose second map is no longer zero."""
    router = router_class(16, 4, **kwargs)
    torch.nn.init.normal_(router.up.weight, generator=torch.Generator().manual_seed(1))
    return router.eval()


@pytest.mark.parametrize("router_type", ROUTERS)
def test_an_untrained_router_weighs_all_experts_alike(router_type):
    output = ROUTERS[router_type](16, 4).eval()(HIDDEN, 2, 1.5)
    assert output.probs.unique().tolist() == [0.25]
    assert output.chosen.sum((0, 1)).tolist() == [40, 40, 40, 40]


def test_two_calls_give_the_same_result_because_dropout_sleeps_outside_training():
    router = trained(BaseMoERouter, dropout=0.5)
    assert torch.equal(router(HIDDEN, 2, 1.5).weights, router(HIDDEN, 2, 1.5).weights)
    router.train()
    torch.manual_seed(0)
    assert not torch.equal(router(HIDDEN, 2, 1.5).weights, router(HIDDEN, 2, 1.5).weights)


def test_a_trained_router_routes_different_tokens_differently():
    chosen = trained(BaseMoERouter)(HIDDEN, 1, 4.0).chosen
    assert len(chosen.flatten(0, 1).unique(dim=0)) > 1


def test_a_pikv_router_that_is_not_cache_aware_is_a_base_router_exactly():
    base, pikv = trained(BaseMoERouter), trained(PiKVMoERouter, cache_aware=False)
    pikv.observe(torch.tensor([0.1, 0.9, 0.5, 0.5]))
    assert torch.equal(base(HIDDEN, 2, 1.5).weights, pikv(HIDDEN, 2, 1.5).weights)


def test_switching_cache_awareness_off_later_silences_what_was_observed():
    base, pikv = trained(BaseMoERouter), trained(PiKVMoERouter)
    pikv.observe(torch.tensor([0.1, 0.9, 0.5, 0.5]))
    assert not torch.equal(base(HIDDEN, 2, 1.5).weights, pikv(HIDDEN, 2, 1.5).weights)
    pikv.cache_aware = False
    assert torch.equal(base(HIDDEN, 2, 1.5).weights, pikv(HIDDEN, 2, 1.5).weights)


def test_experts_that_did_better_than_the_mean_get_more_of_the_next_routing():
    router = PiKVMoERouter(16, 4).eval()
    router.observe(torch.tensor([0.9, 0.5, 0.5, 0.1]))
    probs = router(HIDDEN, 2, 1.5).probs[0, 0]
    assert probs[0] > 0.25 > probs[3]
    assert_close(probs[0] / probs[1], torch.tensor(router.feedback_strength * 0.4).exp())  # multiplicative weights


def test_unknown_hit_rates_change_nothing():
    router = PiKVMoERouter(16, 4).eval()
    router.observe(torch.full((4,), torch.nan))
    assert router.hit_rate.isnan().all()
    assert router(HIDDEN, 2, 1.5).probs.unique().tolist() == [0.25]
    router.observe(torch.tensor([0.8, torch.nan, 0.4, torch.nan]))
    assert_close(router.hit_rate, torch.tensor([0.8, torch.nan, 0.4, torch.nan]), equal_nan=True)
    assert router.feedback()[1] == 0


def test_hit_rates_are_running_averages():
    router = PiKVMoERouter(16, 2, momentum=0.75)
    router.observe(torch.tensor([1.0, 0.0]))
    router.observe(torch.tensor([0.0, 0.0]))
    assert router.hit_rate.tolist() == [0.75, 0.0]


def test_gradients_reach_all_maps_of_a_router():
    router = trained(PiKVMoERouter)
    router.observe(torch.tensor([0.9, 0.5, 0.5, 0.1]))
    output = router(HIDDEN, 2, 1.5)
    (output.weights.square().sum() + output.aux_loss).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in router.parameters())


CONFIG = RouterConfig("pikv", ("aggressive", "selective"), num_layers=3, hidden_size=16)


def test_saved_routers_come_back_bit_for_bit(tmp_path):
    routers = Routers(CONFIG)
    for router in routers.layers:
        torch.nn.init.normal_(router.up.weight)
    routers.layers[1].observe(torch.tensor([0.2, torch.nan]))
    loaded = load_routers(save_routers(routers, tmp_path / "new" / "folder", metrics={"loss": 1.5}))
    assert loaded.config == CONFIG
    for name, tensor in routers.state_dict().items():
        assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_routers_built_alike_are_alike():
    first, second = Routers(CONFIG), Routers(CONFIG)
    assert torch.equal(first.layers[2].down.weight, second.layers[2].down.weight)
    assert not torch.equal(first.layers[1].down.weight, first.layers[2].down.weight)


@pytest.mark.parametrize("damage", ["truncated weights", "no json", "broken json", "other sizes", "no such directory"])
def test_a_damaged_router_file_is_refused_by_name(tmp_path, damage, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = save_routers(Routers(CONFIG), tmp_path / "router")
    weights, card = directory / "routers.safetensors", directory / "routers.json"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no json":
        card.unlink()
    elif damage == "broken json":
        card.write_text(card.read_text()[:40])
    elif damage == "other sizes":
        content = json.loads(card.read_text())
        content["config"]["hidden_size"] = 17
        card.write_text(json.dumps(content))
    else:
        directory = tmp_path / "nowhere"
    with pytest.raises(CheckpointError, match="router: "):
        load_routers(directory)


def test_a_failed_save_leaves_the_old_file_and_no_fragments(tmp_path, monkeypatch):
    directory = save_routers(Routers(CONFIG), tmp_path)
    before = (directory / "routers.safetensors").read_bytes()

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("kvpress_moe.routers.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_routers(Routers(CONFIG), tmp_path)
    assert (directory / "routers.safetensors").read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == ["routers.json", "routers.safetensors"]
