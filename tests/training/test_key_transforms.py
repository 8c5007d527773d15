"""Key transforms fit the keys of a model: coefficients have variance 1 and are not correlated, under every scaling."""

import pytest
import torch

from kvpress_moe.codes.key_transform import KeyBasis
from kvpress_moe.codes.rotary import Rotary
from kvpress_moe.errors import SettingError
from kvpress_moe.training.key_transforms import fit_key_transforms
from tests.tiny import decoder, prefill, tiny_model, tokens

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize("settings", [{}, {"rope_scaling": YARN}])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_coefficients_of_the_prompts_have_variance_1_and_do_not_correlate(family, settings):
    if family == "phi3" and settings:
        pytest.skip("its scaling is LongRoPE")
    model = tiny_model(family, **settings)
    prompts = [tokens(300, seed=seed) for seed in range(6)]
    transforms = fit_key_transforms(model, prompts)
    stack = decoder(model)
    for layer_idx, transform in transforms.items():
        found = []
        for prompt in prompts:
            cos, sin = stack.rotary_emb(torch.zeros(1), torch.arange(2)[None])
            basis = KeyBasis(transform, Rotary.of(cos[0], sin[0]), 300)
            keys = prefill(model, prompt).layers[layer_idx].keys
            found.append(basis.coefficients(keys, torch.arange(300)[None])[0, :, 4:])
        coefficients = torch.cat(found, 1)
        moments = coefficients.mT @ coefficients / coefficients.shape[1]
        assert torch.allclose(moments, torch.eye(moments.shape[-1]).expand_as(moments), atol=0.1)
        assert (transform.deviation.diff(dim=-1) <= 1e-3).all()  # sorted: the first matter most


def test_prompts_that_are_too_short_are_refused():
    with pytest.raises(SettingError, match="transform_prompts: got 2, expected prompts of more than 4 tokens"):
        fit_key_transforms(tiny_model("llama"), [tokens(3), tokens(4)])
