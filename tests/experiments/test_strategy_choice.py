"""The rules that routed strategies are compared with are what they say."""

from torch.testing import assert_close

from experiments.strategy_choice import methods_of, table, without_rule
from kvpress_moe.benchmark.shared_prefill import select_pairs
from kvpress_moe.budget.shared_bytes import POWER
from kvpress_moe.press.packing import N_SINK
from tests.tiny import calibrated_routers, tiny_model, tokens


def test_one_precision_for_all_but_the_first_tokens_and_the_rule_without_what_was_learned():
    model = tiny_model("llama", head_dim=32)
    routers = calibrated_routers(model)
    methods = methods_of(routers, {})
    assert next(iter(methods)) == "routed"
    names = ["routed", "constants", "K4V4"]
    kept = select_pairs(model, tokens(400), methods, [(name, 0.7) for name in names], 4, 16).kept
    single = kept["K4V4", 0.7].coded
    for layer in single.strategies:
        assert (layer[:, :N_SINK] == 2).all()  # whole
        assert (layer[:, N_SINK:] < 2).all()
    shares = [kept[name, 0.7].coded.n_bytes / (2 * 2 * 400 * 2 * 32 * 2) for name in names]
    assert all(0.25 < share <= 0.3 for share in shares)
    plain = without_rule(routers)
    assert all(layer.rule is None for layer in plain.layers)
    assert_close(plain.layers[0].down.weight, routers.layers[0].down.weight)
    assert routers.layers[0].rule.powers.tolist() != [POWER, POWER]


def test_the_table_names_the_best_single_precision_at_each_share():
    kl = {
        "routed": {0.1: [0.1, 0.2], 0.05: [0.3, 0.4]},
        "K2V2": {0.1: [0.5, 0.7], 0.05: [0.5, 0.5]},
        "K4V4": {0.1: [0.2, 0.3], 0.05: [0.9, 0.9]},
    }
    lines = table(kl, [0.1, 0.05], list(kl))
    assert lines[2] == "| routed | 0.1500 | 0.3500 |"
    assert lines[3] == "| best single precision | K4V4: 0.2500 [+0.1000, +0.1000] | K2V2: 0.5000 [+0.1000, +0.2000] |"
