"""
The ``kv-press-text-generation`` pipeline under our press: one prefill, an answer for every question, each the same as
asking by hand on the compressed cache.
"""

import pytest
from kvpress import DecodingPress, KVPressTextGenerationPipeline, PrefillDecodingPress
from kvpress.utils import compute_n_kept
from transformers import DynamicCache, pipeline

from kvpress_moe import MoERouterPress
from tests.tiny import greedy, lengths, prefill, tiny_model

CONTEXT = "The key is under the third stone from the left. " * 4
QUESTIONS = ["Where is the key?", "How many stones are there?", "Why?"]
N_CONTEXT = 1 + len(CONTEXT)  # <s>, and a token for every byte


@pytest.fixture(scope="module")
def ask(llama, tokenizer):
    return KVPressTextGenerationPipeline(model=llama, tokenizer=tokenizer)


def by_hand(model, tokenizer, question, press, max_new_tokens):
    """The answer to one question, from a prefill and a loop of our own."""
    context = tokenizer("<s>" + CONTEXT, return_tensors="pt", add_special_tokens=False).input_ids
    assert context.shape[1] == N_CONTEXT
    cache = prefill(model, context, press)
    question = tokenizer(question + "\n", return_tensors="pt", add_special_tokens=False).input_ids
    answer = greedy(model, question, cache, N_CONTEXT, max_new_tokens)
    return tokenizer.decode(answer[0], skip_special_tokens=True)


@pytest.mark.parametrize("ratio", [None, 0, 0.3, 0.8])
def test_one_question_has_one_answer(ask, ratio):
    press = MoERouterPress(compression_ratio=ratio)
    result = ask(CONTEXT, question=QUESTIONS[0], press=press, max_new_tokens=6)
    assert list(result) == ["answer"]
    assert isinstance(result["answer"], str)


@pytest.mark.parametrize("press", [None, MoERouterPress()], ids=["no press", "press"])
@pytest.mark.parametrize("n_questions", [1, 3])
def test_as_many_answers_as_questions(ask, press, n_questions):
    answers = ask(CONTEXT, questions=QUESTIONS[:n_questions], press=press, max_new_tokens=6)["answers"]
    assert len(answers) == n_questions
    assert all(isinstance(answer, str) for answer in answers)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
@pytest.mark.parametrize("question", QUESTIONS)
def test_an_answer_is_the_one_got_by_hand(ask, llama, tokenizer, question, ratio):
    press = MoERouterPress(compression_ratio=ratio, cache_aware=False)
    answer = ask(CONTEXT, question=question, press=press, max_new_tokens=8)["answer"]
    assert answer == by_hand(llama, tokenizer, question, press, 8)


def test_questions_asked_together_are_answered_as_alone(ask):
    press = MoERouterPress(cache_aware=False)
    together = ask(CONTEXT, questions=QUESTIONS, press=press, max_new_tokens=8)["answers"]
    alone = [ask(CONTEXT, question=question, press=press, max_new_tokens=8)["answer"] for question in QUESTIONS]
    assert together == alone
    assert len(set(together)) == 3  # the tiny model does tell questions apart


def test_the_context_is_read_and_compressed_once_for_all_questions(ask):
    press, cache = MoERouterPress(compression_ratio=0.8), DynamicCache()
    ask(CONTEXT, questions=QUESTIONS, press=press, cache=cache, max_new_tokens=6)
    assert press.get_stats()["forward_count"] == 1
    assert lengths(cache) == [compute_n_kept(N_CONTEXT, 0.8)] * 2  # answers are taken off again


def test_ratio_zero_answers_as_without_a_press(ask):
    with_press, without = (
        ask(CONTEXT, questions=QUESTIONS, press=press, max_new_tokens=8)["answers"]
        for press in (MoERouterPress(compression_ratio=0), None)
    )
    assert with_press == without


def test_compression_changes_answers(ask):
    pressed, without = (
        ask(CONTEXT, questions=QUESTIONS, press=press, max_new_tokens=8)["answers"]
        for press in (MoERouterPress(compression_ratio=0.9), None)
    )
    assert pressed != without


def test_the_pipeline_leaves_the_model_as_it_was(ask, llama, tokenizer):
    before = by_hand(llama, tokenizer, QUESTIONS[0], None, 8)
    ask(CONTEXT, question=QUESTIONS[0], press=MoERouterPress(), max_new_tokens=2)
    assert by_hand(llama, tokenizer, QUESTIONS[0], None, 8) == before


def test_the_pipeline_is_found_by_its_name(model_directory):
    ask = pipeline("kv-press-text-generation", model=str(model_directory), device="cpu")
    answer = ask(CONTEXT, question=QUESTIONS[0], press=MoERouterPress(), max_new_tokens=4)["answer"]
    assert isinstance(answer, str)


def test_no_question_continues_the_context(ask):
    assert isinstance(ask(CONTEXT, press=MoERouterPress(), max_new_tokens=4)["answer"], str)


def test_gemma_answers_several_questions(tokenizer):
    ask = KVPressTextGenerationPipeline(model=tiny_model("gemma3_text"), tokenizer=tokenizer)
    press = MoERouterPress(cache_aware=False)
    together = ask(CONTEXT, questions=QUESTIONS, press=press, max_new_tokens=4)["answers"]
    assert together == [ask(CONTEXT, question=some, press=press, max_new_tokens=4)["answer"] for some in QUESTIONS]


@pytest.mark.parametrize("phase", ["decoding", "both"])
def test_decoding_wrappers_bound_the_cache_in_the_pipeline(ask, phase):
    cache = DynamicCache()
    press = DecodingPress(MoERouterPress(compression_ratio=None), compression_interval=3, target_size=48)
    if phase == "both":
        press = PrefillDecodingPress(MoERouterPress(compression_ratio=0.7), press)
    seen = []  # the pipeline takes the answer off again, so look after every step
    hook = ask.model.register_forward_hook(lambda *_: seen.append(lengths(cache)))
    try:
        ask(CONTEXT, question=QUESTIONS[0], press=press, cache=cache, max_new_tokens=12)
    finally:
        hook.remove()
    assert all(48 <= length <= 48 + 3 for length in seen[-1])
