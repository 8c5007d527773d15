"""Chats that are answered together get the answers that each gets alone, also while a document is read."""

import threading

import pytest

from kvpress_moe.serve.chat_request import ChatRequest
from kvpress_moe.serve.scheduler import Job, Scheduler
from kvpress_moe.serve.work import Compress
from tests.serve.made import NAME, SETTINGS, TEXT, make_engine


@pytest.fixture
def engine(llama, chat_tokenizer, tmp_path):
    return make_engine(llama, chat_tokenizer, tmp_path)


def asked(content, *documents, n=12):
    return ChatRequest(NAME, ({"role": "user", "content": content},), documents, max_tokens=n, temperature=0)


def run(engine, *all_steps):
    """The events of jobs that are submitted at once."""
    scheduler, found, ends = Scheduler(engine), [[] for _ in all_steps], [threading.Event() for _ in all_steps]

    def on_event(number):
        def note(kind, value):
            found[number].append(value if kind == "item" else kind)
            if kind != "item":
                ends[number].set()

        return note

    for number, steps in enumerate(all_steps):
        scheduler.submit(Job(steps, on_event(number)))
    for end in ends:
        assert end.wait(60)
    scheduler.close()
    return found


def text_of(pieces):
    assert pieces[-1] == "end"
    return "".join(piece.text for piece in pieces[:-1])


def test_chats_that_are_answered_together_get_what_each_gets_alone(engine):
    mill, sea = (engine.compress(Compress("", engine.prefix_of(text))) for text in (TEXT, TEXT.replace("mill", "sea")))
    requests = [asked("Who?", mill.id), asked("When was it?", mill.id), asked("Who?", sea.id), asked("Hello")]
    alone = [text_of(run(engine, lambda emit, one=one: engine.answer(one))[0]) for one in requests]
    together = run(engine, *(lambda emit, one=one: engine.answer(one) for one in requests))
    assert [text_of(pieces) for pieces in together] == alone
    assert len(set(alone)) > 2


def test_answers_go_on_while_a_document_is_read_and_both_are_as_they_are_alone(engine, monkeypatch):
    mill = engine.compress(Compress("", engine.prefix_of(TEXT)))
    request, other = asked("Who?", mill.id, n=40), TEXT.replace("mill", "lighthouse")
    alone = text_of(run(engine, lambda emit: engine.answer(request))[0])
    expected = engine.compress(Compress("", engine.prefix_of(other)))
    kept = [layer.lengths for layer in engine.store.cache(expected).layers]
    engine.store.delete(expected.id)
    order = []

    def document(emit):
        work = Compress("", engine.prefix_of(other), on_layer=lambda done, total: order.append("layer"))
        yield (yield work)

    def answer(emit):
        for piece in (steps := engine.answer(request)):
            order.append("token")
            logits = yield piece
            while logits is not None:
                piece = steps.send(logits)
                logits = yield piece

    made, pieces = run(engine, document, answer)
    assert made[0].id == expected.id
    assert [layer.lengths for layer in engine.store.cache(made[0]).layers] == kept
    assert text_of(pieces) == alone
    first, last = order.index("layer"), len(order) - order[::-1].index("layer")
    assert "token" in order[first:last]


def test_a_document_says_what_was_kept_and_how_long_it_took(engine, llama):
    document = engine.compress(Compress("", engine.prefix_of(TEXT)))
    report = document.report
    assert report.full_bytes == document.n_tokens * llama.config.num_hidden_layers * 2 * 2 * 8 * 2  # heads, dim
    assert report.read_seconds > 0
    assert (report.kept, report.max_kl, report.expected_kl) == ({}, None, None)
    again = engine.store.find(document.id)
    assert again == document


def test_the_time_of_answers_in_between_is_not_counted_as_reading(engine, llama, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 1
        return now[0]

    def between():
        now[0] += 100

    monkeypatch.setattr("kvpress_moe.serve.engine.time.perf_counter", clock)
    work = Compress("", engine.prefix_of(TEXT))
    assert engine.compress(work, between).report.read_seconds == llama.config.num_hidden_layers + 1


def test_a_document_says_how_many_pairs_each_strategy_got(llama, chat_tokenizer, tmp_path):
    engine = make_engine(
        llama, chat_tokenizer, tmp_path, settings=SETTINGS | {"precision": [(8, 4), (4, 2)], "compression_ratio": 0.9}
    )
    kept = engine.compress(Compress("", engine.prefix_of(TEXT))).report.kept
    assert sum(kept.values()) == pytest.approx(1)
    assert set(kept) <= {"evict", "K8V4", "K4V2"}
    assert len(kept) > 1


def test_without_a_press_documents_stay_as_they_are(llama, chat_tokenizer, tmp_path):
    engine = make_engine(llama, chat_tokenizer, tmp_path, settings=None)
    document = engine.compress(Compress("", engine.prefix_of(TEXT)))
    assert document.n_bytes == 2 * document.report.full_bytes  # in float32
    request = asked("Who?", document.id)
    with_document = text_of(run(engine, lambda emit: engine.answer(request))[0])
    engine.store.delete(document.id)
    whole = asked(f"{TEXT}\n\nWho?")
    assert text_of(run(engine, lambda emit: engine.answer(whole))[0]) == with_document
