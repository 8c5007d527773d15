"""Figures of experiments: tokens within a window, and spreads between and within texts, against values by hand."""

import pytest
import torch

from experiments.question_spread import spreads
from experiments.serve_load import tokens_within


def test_tokens_are_counted_within_the_seconds_after_the_first_question():
    answers = [
        {"started": 100.0, "first": 1.0, "whole": 5.0, "tokens": 32},  # within
        {"started": 107.0, "first": 1.0, "whole": 5.0, "tokens": 32},  # half of it is written when the time is over
        {"started": 108.0, "first": 3.0, "whole": 4.0, "tokens": 32},  # its first token comes too late
    ]
    assert tokens_within(answers, 10) == pytest.approx(32 + 16)


def test_the_spread_of_a_texts_questions_leaves_out_what_the_texts_differ_in():
    logs = torch.tensor([[-1.0, 1.0], [9.0, 11.0], [99.0, 101.0]])
    found = spreads(logs, torch.full((3, 2), 3.0))
    assert found["questions"] == pytest.approx(2**0.5)
    assert found["error"] == pytest.approx(3.0)  # an error that all prompts share counts too
    assert found["all"] == pytest.approx(float(logs.std()))
