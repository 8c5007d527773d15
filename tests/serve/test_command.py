"""kvpress-moe serve: mistakes are named before a model is loaded."""

import pytest
from typer.testing import CliRunner

from kvpress_moe.cli import app
from kvpress_moe.cli.serve import fastest_attention
from kvpress_moe.errors import SettingError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bytes", "0"], "bytes: got 0.0"),
        (["--bytes", "0.1", "--max-kl", "0.02"], "bytes: got 0.1, expected no --bytes with --max-kl"),
        (["--max-kl", "-1"], "max_kl: got -1.0"),
        (["--confidence", "0.8"], "confidence: got 0.8, expected none without --max-kl"),
        (["--port", "70000"], "port: got 70000"),
        (["--memory", "0"], "memory: got 0"),
        (["--queue", "0"], "queue: got 0"),
        (["--active", "0"], "active: got 0"),
        (["--attention", "fast"], "attention: got 'fast'"),
        (["--attention", "compiled", "--device", "cuda"], "attention: got 'compiled', expected torch or triton"),
        (["--bytes", "1", "--router", "mine"], "router: got 'mine', expected none with --bytes 1"),
        (["--host", "0.0.0.0"], "api_key: got None, expected a key, because 0.0.0.0 can be reached from elsewhere"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_a_model_is_loaded(tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("kvpress_moe.model.loading.load_model", lambda *_: 1 / 0)
    result = CliRunner().invoke(app, ["serve", "--caches", str(tmp_path), *arguments])
    assert message in str(result.exception), result.output


def test_a_model_without_a_chat_template_is_refused(tmp_path, model_directory):
    result = CliRunner().invoke(
        app, ["serve", "--caches", str(tmp_path), "--port", "0", "--model", str(model_directory)]
    )
    assert "model: got" in str(result.exception)
    assert "chat template" in str(result.exception)


def test_plain_pytorch_takes_the_place_of_a_library_that_cannot_be_built(monkeypatch, capsys):
    def fail():
        raise SettingError("attention", "compiled", "a C compiler", "Or use 'torch'.")

    monkeypatch.setattr("kvpress_moe.cache.compiled_products.library", fail)
    monkeypatch.setattr("kvpress_moe.cache.compiled_products.find_compiler", lambda: "cc")
    assert fastest_attention("cpu") == "torch"
    assert "plain PyTorch, which is slower" in capsys.readouterr().err
    assert fastest_attention("cuda") == "torch"
    monkeypatch.setattr("kvpress_moe.cache.compiled_products.find_compiler", lambda: None)
    assert fastest_attention("cpu") == "torch"
