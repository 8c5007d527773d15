"""Routers learn from captured prompts, the press gives the scores they were fitted to, and runs are repeatable."""

import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from kvpress_moe import MoERouterPress
from kvpress_moe.benchmark.kvzip_scores import ReplayScores, chat_suffix
from kvpress_moe.benchmark.prompts import encode
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.errors import ExpertError, NotFiniteError, SettingError
from kvpress_moe.experts.registry import make_expert
from kvpress_moe.model.hooks import prepared
from kvpress_moe.model.layers import full_attention_layers
from kvpress_moe.routers import BaseMoERouter
from kvpress_moe.routers.checkpoint import load_routers, save_routers
from kvpress_moe.routers.resolve import SHIPPED
from kvpress_moe.training.capture import capture, written_norm
from kvpress_moe.training.config import TrainingConfig
from kvpress_moe.training.distributed import Processes
from kvpress_moe.training.layerwise import LayerData, fit_layer, fold_scaling, predict
from kvpress_moe.training.losses import FLOOR, budget_loss, tail_weights, target
from kvpress_moe.training.trainer import prompts, train
from tests.tiny import FAMILIES, decoder, prefill, tiny_model

CONFIG = TrainingConfig(
    long_samples=0,
    end_to_end=2,
    experts=("learned", "keydiff", "cur"),
    top_k=2,
    samples=3,
    study=0,
    length=600,
    tasks=("kv_list", "prose"),
    epochs=8,
    bottleneck=8,
    learned_width=8,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def trained(llama, chat_tokenizer, shards):
    torch.set_num_threads(1)  # as the tests themselves: sums in another order are not the same to the bit
    return train(llama, chat_tokenizer, CONFIG, shards)


@pytest.fixture(scope="module")
def prompt(chat_tokenizer):
    return encode(make_sample("kv_list", len, 700, 0), chat_tokenizer)


def test_training_is_repeatable_and_takes_up_what_was_captured(llama, chat_tokenizer, shards, trained, monkeypatch):
    def never(*args):
        raise AssertionError("captured again")

    monkeypatch.setattr("kvpress_moe.training.trainer.capture", never)
    for path in shards.glob("fitted-*/layer-*"):
        path.unlink()
    again, metrics = train(llama, chat_tokenizer, CONFIG, shards)
    for name, tensor in again.state_dict().items():
        assert_close(tensor, trained[0].state_dict()[name], equal_nan=True, rtol=0, atol=0)
    assert metrics == trained[1]
    with pytest.raises(SettingError, match="^shards: got"):
        train(llama, chat_tokenizer, replace(CONFIG, experts=("learned", "knorm"), top_k=1), shards)
    with pytest.raises(SettingError, match="^shards: got .* of seed 1"):
        train(llama, chat_tokenizer, replace(CONFIG, seed=1), shards)


def test_the_loss_of_every_epoch_is_kept_and_falls(trained):
    curves = trained[1]["loss_by_epoch"]
    assert [len(curve) for curve in curves] == [CONFIG.epochs] * 2
    assert [curve[-1] for curve in curves] == trained[1]["loss_by_layer"]
    assert all(curve[-1] < curve[0] for curve in curves)


def test_two_runs_write_the_same_bytes_whatever_was_drawn_before(llama, chat_tokenizer, shards, trained, tmp_path):
    torch.manual_seed(1)
    torch.rand(7)
    again = train(llama, chat_tokenizer, CONFIG, tmp_path / "shards")
    for path in shards.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes(), path.name
    files = [save_routers(run[0], tmp_path / name) for name, run in (("one", trained), ("other", again))]
    one, other = ({path.name: path.read_bytes() for path in file.glob("*.safetensors")} for file in files)
    assert one == other
    assert one


def test_a_fit_that_was_interrupted_goes_on_with_the_layers_that_are_missing(
    llama, chat_tokenizer, trained, tmp_path, monkeypatch
):
    fitted = []

    def interrupted(router, *args, **kwargs):
        if fitted:
            raise KeyboardInterrupt
        fitted.append(router)
        return fit_layer(router, *args, **kwargs)

    monkeypatch.setattr("kvpress_moe.training.trainer.fit_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(llama, chat_tokenizer, CONFIG, tmp_path)
    fitted.clear()
    routers, metrics = train(llama, chat_tokenizer, CONFIG, tmp_path)
    assert len(fitted) == 1  # of two layers
    assert metrics == trained[1]
    for name, tensor in routers.state_dict().items():
        assert_close(tensor, trained[0].state_dict()[name], equal_nan=True, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("moment", ["*.safetensors", "fitted-*/layer-000.safetensors", "fitted-*/epoch-0.safetensors"])
def test_training_that_is_killed_goes_on_and_ends_the_same(llama, chat_tokenizer, trained, tmp_path, moment):
    """While prompts are captured, layers fitted, all of them tuned; `make kill` does it at random moments."""
    child = os.fork()
    if child == 0:
        try:
            train(llama, chat_tokenizer, CONFIG, tmp_path)
        finally:
            os._exit(0)
    while not list(tmp_path.glob(moment)):
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the child ended before it could be killed"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert left
    routers, metrics = train(llama, chat_tokenizer, CONFIG, tmp_path)
    assert len(left) < len(list(tmp_path.rglob("*.safetensors"))), "nothing was left to do"
    assert {path: path.stat().st_mtime_ns for path in left} == left, "done again"
    assert metrics == trained[1]
    for name, tensor in routers.state_dict().items():
        assert_close(tensor, trained[0].state_dict()[name], equal_nan=True, rtol=0, atol=0)


TOGETHER = """
import torch
from pathlib import Path
from tests.tiny import byte_tokenizer, tiny_model
from tests.training.test_training import CONFIG
from kvpress_moe.routers.checkpoint import save_routers
from kvpress_moe.training.distributed import launched
from kvpress_moe.training.trainer import train
torch.set_num_threads(1)
processes = launched("cpu")
routers, metrics = train(tiny_model("llama"), byte_tokenizer(chat=True), CONFIG, Path({shards!r}), processes=processes)
save_routers(routers, Path({out!r}) / str(processes.rank), metrics)
"""


def test_processes_that_were_launched_together_train_what_one_trains_alone(trained, tmp_path):
    script = TOGETHER.format(shards=str(tmp_path / "shards"), out=str(tmp_path / "out"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = [
        subprocess.Popen([sys.executable, "-c", script], env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    for rank in range(2):
        together = load_routers(tmp_path / "out" / str(rank))
        for name, tensor in together.state_dict().items():
            assert_close(tensor, trained[0].state_dict()[name], equal_nan=True, rtol=0, atol=0)


def test_processes_without_a_directory_in_common_are_refused(llama, chat_tokenizer):
    processes = Processes()
    processes.size = 2
    with pytest.raises(SettingError, match="^shards: got None"):
        train(llama, chat_tokenizer, CONFIG, processes=processes)


def test_fitting_finds_a_score_that_is_there():
    """Targets made of ranks, of the hidden state, and of a choice between experts that the hidden state tells."""
    hidden, ranks = torch.randn(3000, 16), torch.rand(3000, 2, 3) * 0.99
    choice = torch.sigmoid(4 * hidden[:, :1])
    routed = 3 * choice * ranks[..., 1] + 3 * (1 - choice) * ranks[..., 2]
    targets = routed + hidden[:, 1:3] - torch.tensor([2.0, 5.0])
    data = LayerData(hidden * 3 + 1, ranks, targets, torch.ones_like(targets), torch.zeros(3))
    constant = (targets - targets.mean(0)).square().mean().item()

    def error(**changes):
        router = BaseMoERouter(16, 3, dropout=0.0, bottleneck=8, num_heads=2, learned=8)
        settings = {"top_k": 3, "learned": 0, "aux_loss_weight": 0.0, "epochs": 40, "learning_rate": 1e-2, "seed": 0}
        fit_layer(router, data, **{**settings, **changes}, batch_size=256)
        with torch.no_grad():
            scores, _ = predict(router, data.hidden, data.ranks, 3, learned=0)
        return (scores - targets).square().mean().item()

    assert error() < 0.03 * constant
    assert error(train_gate=False) > 2 * error()  # the choice is in the gate, and nowhere else


def test_the_learned_expert_learns_whom_to_believe():
    """Targets that follow one expert where the other ranks a pair high, and nothing where it does not."""
    hidden, ranks = torch.randn(4000, 8), torch.rand(4000, 1, 3) * 0.99
    targets = 3 * ranks[..., 1] * (ranks[..., 2] > 0.5)
    data = LayerData(hidden, ranks, targets, torch.ones_like(targets), torch.zeros(3))
    errors = []
    for num_seen in (2, 0):
        router = BaseMoERouter(8, 3, dropout=0.0, bottleneck=8, num_heads=1, learned=16, num_seen=num_seen)
        fit_layer(router, data, 3, 0, 0.0, epochs=30, learning_rate=1e-2, seed=0, batch_size=256)
        with torch.no_grad():
            errors.append((predict(router, hidden, ranks, 3, learned=0)[0] - targets).square().mean().item())
    assert errors[0] < 0.6 * errors[1]


def test_the_budget_loss_asks_which_side_of_a_threshold_a_pair_is_on():
    targets, thresholds = torch.tensor([[-5.0], [-1.0], [3.0]]), torch.tensor([0.0])
    right, wrong = torch.tensor([[-9.0], [-4.0], [1.0]]), torch.tensor([[-5.0], [0.5], [3.0]])
    assert (right - targets).square().mean() > (wrong - targets).square().mean()
    assert budget_loss(right, targets, thresholds) < 0.3 * budget_loss(wrong, targets, thresholds)


def test_the_press_gives_the_scores_that_were_fitted(llama, trained, prompt):
    """One formula in two places: training does all experts at once, the press one after the other."""
    press = MoERouterPress(router=trained[0], capacity_factor=10.0)
    seen = {}

    def score(module, args, kwargs, output):
        layer = cache.layers[module.layer_idx]
        seen[module.layer_idx] = (
            kwargs["hidden_states"],
            press.score(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs),
            torch.stack([rank(name, module, layer, kwargs) for name in ("keydiff", "keydiff", "cur")], -1),
        )

    def rank(name, module, layer, kwargs):
        from kvpress_moe.experts.layer_call import LayerCall
        from kvpress_moe.experts.mixing import rank_within_head

        call = LayerCall(module, kwargs["hidden_states"], layer.keys, layer.values, None, kwargs)
        return rank_within_head(make_expert(name).score(call, 0.5))

    cache = DynamicCache()
    with prepared(llama, [press]):
        hooks = [layer.self_attn.register_forward_hook(score, with_kwargs=True) for layer in decoder(llama).layers]
        with torch.no_grad():
            llama.model(input_ids=prompt.context, past_key_values=cache)
        for hook in hooks:
            hook.remove()
    assert list(press.expert_strategies.values()) == list(CONFIG.experts)
    assert press.top_k == 2
    for layer_idx, (hidden, scores, ranks) in seen.items():
        with torch.no_grad():
            expected, _ = predict(trained[0].layers[layer_idx], hidden[0], ranks[0].transpose(0, 1), 2, learned=0)
        assert_close(scores[0].T, expected, rtol=1e-4, atol=1e-4)


def test_trained_routers_share_one_budget_unless_told_otherwise(llama, trained, prompt):
    ragged = prefill(llama, prompt.context, MoERouterPress(0.7, router=trained[0]))
    n_kept = int(prompt.context.shape[1] * (1 - 0.7))
    assert sum(sum(layer.lengths[0]) for layer in ragged.layers) == 2 * 2 * n_kept
    assert len({length for layer in ragged.layers for length in layer.lengths[0]}) > 1
    uniform = prefill(llama, prompt.context, MoERouterPress(0.7, router=trained[0], budget="uniform"))
    assert [layer.keys.shape[2] for layer in uniform.layers] == [n_kept] * 2


def test_saved_and_loaded_routers_keep_the_same_pairs(llama, trained, prompt, tmp_path):
    save_routers(trained[0], tmp_path, trained[1])
    assert load_routers(tmp_path).config == trained[0].config
    live = prefill(llama, prompt.context, MoERouterPress(0.7, router=trained[0]))
    loaded = prefill(llama, prompt.context, MoERouterPress(0.7, router=tmp_path))
    for one, other in zip(live.layers, loaded.layers, strict=True):
        assert torch.equal(one.flat_keys, other.flat_keys)
    assert json.loads((tmp_path / "routers.json").read_text())["metrics"]["recipe"]["seed"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains(family, chat_tokenizer, prompt):
    """Where some layers slide, the others alone are captured, fitted and share the budget."""
    model = tiny_model(family)
    text_config = model.config.get_text_config()
    full = full_attention_layers(model)
    config = replace(CONFIG, samples=2, epochs=1)
    routers, metrics = train(model, chat_tokenizer, config)
    assert len(metrics["loss_by_layer"]) == len(full)
    blank = [not any(weights.any() for weights in router.parameters()) for router in routers.layers]
    assert blank == [layer_idx not in full for layer_idx in range(len(blank))]
    cache = prefill(model, prompt.context, MoERouterPress(0.5, router=routers))
    kept = sum(sum(cache.layers[layer_idx].lengths[0]) for layer_idx in full)
    assert kept == len(full) * text_config.num_key_value_heads * (prompt.context.shape[1] // 2)


@pytest.mark.parametrize(
    "family", [family for family in ("gemma3_text", "gemma3", "qwen3_moe", "olmoe") if family in FAMILIES]
)
def test_layers_are_captured_with_their_own_scaling_rotation_and_norms(family, chat_tokenizer, prompt):
    """The attention that the answer pays, against the weights that eager attention returns."""
    model = tiny_model(family, attn_implementation="eager")
    shard = capture(tiny_model(family), chat_tokenizer, prompt, [make_expert("keydiff")])
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=prompt.context, past_key_values=cache)
        tokens = torch.cat((prompt.question, prompt.answer[:, :-1]), 1)
        attentions = model(input_ids=tokens, past_key_values=cache, output_attentions=True).attentions
    n_context = prompt.context.shape[1]
    heads = model.config.get_text_config().num_key_value_heads
    for number, layer_idx in enumerate(full_attention_layers(model)):
        expected = attentions[layer_idx][0, :, :, :n_context].unflatten(0, (heads, -1)).amax((1, 2))
        assert_close(shard["answer"][number].float().exp(), expected, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("family", [family for family in ("llama", "qwen3_moe", "olmoe") if family in FAMILIES])
def test_captured_targets_are_the_largest_attention_that_a_repetition_pays(family, chat_tokenizer, prompt):
    """By hand: let the request and the context pass over the full cache, and look at every attention weight."""
    shard = capture(tiny_model(family), chat_tokenizer, prompt, [make_expert("keydiff")])
    ask = chat_tokenizer(
        "\n\nRepeat the previous context exactly.", add_special_tokens=False, return_tensors="pt"
    ).input_ids
    suffix = chat_tokenizer(chat_suffix(chat_tokenizer), add_special_tokens=False, return_tensors="pt").input_ids
    repeated = prompt.context[:, prompt.n_prefix :]
    eager = tiny_model(family, attn_implementation="eager")
    cache = prefill(eager, prompt.context)
    with torch.no_grad():
        ids = torch.cat((ask, suffix, repeated), 1)
        attentions = eager(input_ids=ids, past_key_values=cache, output_attentions=True).attentions
    for layer_idx, attention in enumerate(attentions):
        n_context = prompt.context.shape[1]
        logs = attention[0].unflatten(0, (2, -1)).clamp(min=1e-30)
        # KVzip leaves the template's prefix, sinks apart, out of the softmax
        seen = torch.cat((logs[..., :4], logs[..., prompt.n_prefix :]), -1)
        kept = (seen / seen.sum(-1, keepdim=True))[..., 4 : 4 + n_context - prompt.n_prefix].amax((1, 2)).log()
        assert_close(shard["replay"][layer_idx][:, prompt.n_prefix :].float(), kept, atol=2e-2, rtol=2e-2)
        assert shard["replay"][layer_idx][:, : prompt.n_prefix].isinf().all()


def test_what_values_write_is_compared_with_the_residual_stream(llama, chat_tokenizer, prompt):
    shard = capture(llama, chat_tokenizer, prompt, [make_expert("keydiff")])
    cache = prefill(llama, prompt.context)
    with torch.no_grad():
        streams = llama(input_ids=prompt.context, output_hidden_states=True).hidden_states
    for layer_idx, writes in enumerate(shard["writes"]):
        expected = written_norm(decoder(llama).layers[layer_idx].self_attn, cache.layers[layer_idx].values)[0].log()
        expected = expected - streams[layer_idx].norm(dim=-1).log().mean()
        assert_close(writes.float(), expected.detach(), atol=2e-2, rtol=2e-2)


def test_a_token_whose_embedding_is_zero_leaves_all_that_is_captured_finite(llama, chat_tokenizer, prompt):
    """Token 0 is the padding token of the tiny Llama."""
    context = prompt.context.clone()
    context[0, 50] = 0
    assert not llama.get_input_embeddings().weight[0].any()
    shard = capture(llama, chat_tokenizer, replace(prompt, context=context), [make_expert("keydiff")])
    assert shard["writes"].isfinite().all()
    assert shard["power"].isfinite().all()


def test_the_learned_expert_is_trained_alone(llama, chat_tokenizer, tmp_path):
    config = replace(CONFIG, experts=("learned",), top_k=1, samples=2, epochs=1, end_to_end=1)
    routers, _ = train(llama, chat_tokenizer, config, tmp_path)
    assert routers.config.experts == ("learned",)


def test_a_fit_that_is_not_finite_is_not_kept(llama, chat_tokenizer, tmp_path):
    with pytest.raises(NotFiniteError, match="loss: got nan for layer 0.*learning_rate"):
        train(llama, chat_tokenizer, replace(CONFIG, samples=2, learning_rate=1e30, end_to_end=0), tmp_path)
    assert not list(tmp_path.rglob("layer-*"))


def test_what_a_value_writes_is_its_norm_after_the_output_projection(llama):
    attention = decoder(llama).layers[0].self_attn
    values = torch.randn(1, 2, 5, 8)
    expected = torch.zeros(1, 2, 5)
    for head in range(2):
        for pair in range(5):
            norms = []
            for query_head in (2 * head, 2 * head + 1):
                whole = torch.zeros(32)
                whole[8 * query_head : 8 * query_head + 8] = values[0, head, pair]
                norms.append(attention.o_proj(whole).norm().item())
            expected[0, head, pair] = max(norms)
    assert_close(written_norm(attention, values).detach(), expected)


def test_targets_and_weights():
    shard = {"replay": torch.tensor([[-1.0, -torch.inf]]), "answer": torch.tensor([[-3.0, -2.0]])}
    shard["writes"] = torch.tensor([[0.5, 1.0]])
    assert target(shard, "replay").tolist() == [[-1, FLOOR]]
    assert target(shard, "replay", 1.0).tolist() == [[-0.5, FLOOR]]
    assert target(shard, "both").tolist() == [[-1, -2]]
    assert target(shard, "both", 0.5).tolist() == [[-0.75, -1.5]]
    weights = tail_weights(torch.tensor([[-4.0], [-2.5], [-1.5], [0.0]]), torch.tensor([-3.0, -2.0, -1.0]))
    assert_close(weights[:, 0], torch.tensor([0.1, 0.4, 0.7, 1.0]))


def test_scaling_is_folded_into_the_first_map():
    linear = torch.nn.Linear(4, 3)
    inputs, mean, std = torch.randn(6, 4), torch.randn(4), torch.rand(4) + 0.5
    expected = linear((inputs - mean) / std)
    fold_scaling(linear, mean, std)
    assert_close(linear(inputs), expected)


def test_the_learned_expert_needs_a_router_and_one_hidden_state_per_pair(llama, prompt):
    with pytest.raises(ExpertError, match="part of a trained router"):
        prefill(llama, prompt.context, MoERouterPress(experts=["learned", "keydiff"]))


def test_replay_leaves_the_cache_as_it_was(llama, chat_tokenizer, prompt):
    cache = prefill(llama, prompt.context)
    before = [layer.keys.clone() for layer in cache.layers]
    ReplayScores().of(llama, chat_tokenizer, prompt.context, cache, prompt.n_prefix)
    for keys, layer in zip(before, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys)


def test_prompts_come_from_the_train_split_in_several_lengths(chat_tokenizer):
    made = prompts(replace(CONFIG, samples=10, length=1024), chat_tokenizer, 4096)
    assert all("/train/" in name for name, _ in made)
    assert len({name.split("/")[2] for name, _ in made}) > 2
    assert len({name for name, _ in made}) == 10


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"experts": ("learned", "knrom")}, "experts"),
        ({"experts": ("cur", "cur")}, "experts"),
        ({"top_k": 4}, "top_k"),
        ({"teacher": "mean"}, "teacher"),
        ({"value_weight": -1.0}, "value_weight"),
        ({"tasks": ("needles",)}, "tasks"),
        ({"epochs": 0}, "epochs"),
        ({"length": 8}, "length"),
        ({"end_to_end": 1.5}, "end_to_end"),
        ({"end_to_end_rate": float("nan")}, "end_to_end_rate"),
        ({"replay_weight": -1.0}, "replay_weight"),
        ({"learning_rate": float("inf")}, "learning_rate"),
    ],
)
def test_bad_recipes_are_refused(change, field):
    with pytest.raises(SettingError, match=f"^{field}: got"):
        replace(CONFIG, **change).check()


def test_pretrained_presses_are_passed_on(llama, trained, prompt, tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="^routers: got None"):
        MoERouterPress().save_pretrained(tmp_path / "none")
    press = MoERouterPress.from_pretrained(trained[0], compression_ratio=0.7)
    first = prefill(llama, prompt.context, press)
    press.save_pretrained(tmp_path / "saved")
    again = MoERouterPress.from_pretrained(tmp_path / "saved", compression_ratio=0.7, cache_aware=False)
    second = prefill(llama, prompt.context, again)
    assert [layer.lengths for layer in first.layers] == [layer.lengths for layer in second.layers]

    uploaded = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert press.push_to_hub("me/routers") == "https://huggingface.co/me/routers"
    assert uploaded == {"me/routers": ["key_transforms.safetensors", "routers.json", "routers.safetensors"]}


@pytest.mark.parametrize("directory", sorted(SHIPPED.glob("*/")), ids=lambda directory: directory.name)
def test_routers_that_ship_load_and_say_how_they_were_made(directory):
    """At most 4 MB, trained, finite; the card's command asks for what the config says."""
    routers = load_routers(directory)
    card = json.loads((directory / "routers.json").read_text())
    config = TrainingConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in card["metrics"]["recipe"].items()})
    assert routers.config.trained
    assert routers.config.experts == config.experts
    assert f"--samples {config.samples} " in card["metrics"]["command"]
    default = TrainingConfig()
    more = {"samples": default.samples, "study": default.study, "long_samples": default.long_samples}
    assert replace(config, tasks=default.tasks, **more) == default
    assert sum(path.stat().st_size for path in directory.iterdir()) < 4e6


def test_the_routers_that_ship_take_at_most_4_mb_of_the_wheel():
    assert sum(len(zlib.compress(path.read_bytes())) for path in SHIPPED.rglob("*.*")) < 4e6


def test_routers_ship_for_the_model_they_were_trained_for_alone(llama, trained, prompt, tmp_path, monkeypatch):
    """Named experts, another router type or another model of the same size leave them aside."""
    save_routers(trained[0], tmp_path / "tiny", dtype=torch.float16)
    monkeypatch.setattr("kvpress_moe.routers.resolve.SHIPPED", tmp_path)
    press = MoERouterPress(0.7)
    prefill(llama, prompt.context, press)
    assert (list(press.expert_strategies.values()), press.top_k, press.scope) == (list(CONFIG.experts), 2, "global")
    other = tiny_model("llama")
    decoder(other).layers[0].self_attn.o_proj.weight.data.normal_()
    prefill(other, prompt.context, press)
    assert (press.expert_strategies[0], press.num_experts, press.top_k) == ("aggressive", 4, 2)
    assert press.scope == "uniform"
    for settings in ({"experts": "guide"}, {"num_experts": 3}, {"router_type": "base"}):
        press = MoERouterPress(0.7, **settings)
        prefill(llama, prompt.context, press)
        assert not press.routers.config.trained
        assert press.scope == "uniform"
