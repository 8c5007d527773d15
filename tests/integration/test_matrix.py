"""docs/compatibility.md says what happens, in every cell."""

import pytest

from kvpress_moe.errors import UnsupportedModelError
from tests.integration import matrix
from tests.integration.matrix import FAMILIES, NOT_RUN, PAGE, SITUATIONS, WORKS, outcome, page, read_page
from tests.tiny import EAGER_ONLY, OLD_MAKE, TOO_NEW
from tests.tiny import FAMILIES as TINY

SAID = read_page(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_page_says_what_happens(situation, family):
    if "quanto" in situation:
        pytest.importorskip("optimum.quanto", reason="needs the extra [quant]")
    assert outcome(family, situation) == SAID.get((situation, family)), "run `make matrix`"


def test_the_page_is_the_one_that_its_outcomes_give():
    assert page(SAID) == PAGE.read_text(encoding="utf-8"), "run `make matrix`"


def test_every_family_that_is_served_has_its_column():
    assert set(FAMILIES) == {*TINY, *OLD_MAKE, *EAGER_ONLY, *TOO_NEW}


def test_a_refusal_is_written_as_its_first_sentence_and_other_errors_are_no_outcome(monkeypatch):
    def raising(error):
        def run(family):
            raise error

        return run

    refusal = UnsupportedModelError("model: got 1.5, expected 2. Buy one.")
    monkeypatch.setattr(matrix, "SITUATIONS", {"refused": raising(refusal), "broken": raising(KeyError("mine"))})
    assert outcome("llama", "refused") == "model: got 1.5, expected 2."
    with pytest.raises(KeyError):
        outcome("llama", "broken")


def test_a_page_is_read_as_it_was_written():
    outcomes = {(s, f): WORKS for s in SITUATIONS for f in FAMILIES}
    outcomes["prefill", "llama"], outcomes["prefill", "olmoe"] = "got 1, expected 2.", NOT_RUN
    assert read_page(page(outcomes)) == outcomes
