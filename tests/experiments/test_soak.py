"""Nothing grows with the number of prompts; a short version of `make soak`, and proof that it would notice."""

import pytest
import torch

from experiments.soak import grown, make_presses, soak
from kvpress_moe import MoERouterPress
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", num_hidden_layers=3)


def test_forty_prompts_leave_no_more_than_twenty(llama):
    rows = soak(40, make_presses(llama), llama, stops=4)
    assert [row.prompts // 10 for row in rows] == [1, 2, 3, 4]
    assert grown(rows) == {}


def test_a_leak_of_one_tensor_a_prompt_a_hook_or_a_statistic_is_noticed(llama):
    class Leaky(MoERouterPress):
        def observe(self, call, routing):
            self.__dict__.setdefault("kept", []).append(call.keys.clone())
            if len(self.kept) == 30:
                call.module.register_forward_hook(lambda *args: None)
            counts = {"calls": 1, "tokens": 1, "aux_loss": 0.0, "assigned": torch.ones(4), "used": torch.ones(4)}
            self._feedback.stats.add(len(self.kept), **counts)
            return super().observe(call, routing)

    rows = soak(12, [Leaky(0.5)], tiny_model("llama", num_hidden_layers=3), stops=3)
    assert grown(rows).keys() >= {"tensors", "tensor_bytes", "hooks", "statistics"}
