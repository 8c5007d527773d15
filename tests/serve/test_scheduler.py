"""Answers grow together, a document is read between them, and a client that goes or fails harms nobody else."""

import threading
import time

import pytest
import torch

from kvpress_moe.serve.api_error import APIError
from kvpress_moe.serve.scheduler import Job, Scheduler
from kvpress_moe.serve.work import CHUNK, Compress, Read, read_in_chunks


class Counting:
    """A worker that notes what it was asked for, and whose logits are the last token of each text."""

    def __init__(self, layers=3):
        self.rounds, self.documents, self.layers = [], [], layers
        self.on_layer = self.on_read = lambda: None

    def read(self, reads):
        self.rounds.append([list(one.input_ids) for one in reads])
        self.on_read()
        return [torch.tensor([one.input_ids[-1]]) for one in reads]

    def compress(self, work, between):
        for _ in range(self.layers):
            self.rounds.append(work.prefix)
            self.on_layer()
            between()
        self.documents.append(work.prefix)
        return work.prefix.upper()


class Client:
    """A job, what it was told, and how to wait for its end."""

    def __init__(self, steps):
        self.events, self._done = [], threading.Event()
        self.job = Job(steps, self._note)

    def _note(self, kind, value):
        self.events.append(value if kind == "item" else (kind, value))
        if kind != "item":
            self._done.set()

    def wait(self):
        assert self._done.wait(10), self.events
        return self.events


@pytest.fixture
def worker():
    return Counting()


@pytest.fixture
def scheduler(worker):
    scheduler = Scheduler(worker, max_active=4, max_waiting=8)
    yield scheduler
    scheduler.close()


def answering(prompt, n_tokens=3):
    """Like an answer: a prompt, then tokens, each of which is one more than the one before."""

    def steps(emit):
        logits = yield from read_in_chunks(None, prompt)
        for _ in range(n_tokens):
            token = int(logits[-1]) + 1
            yield token
            logits = yield from read_in_chunks(None, [token])

    return steps


def held(scheduler):
    """Let the scheduler's thread wait until the returned event is set, so that jobs come together."""
    begun, going = threading.Event(), threading.Event()

    def steps(emit):
        begun.set()
        going.wait(10)
        yield "held"

    scheduler.submit(Job(steps, lambda *_: None))
    assert begun.wait(10)
    return going


def submit_together(scheduler, *all_steps):
    going = held(scheduler)
    clients = [Client(steps) for steps in all_steps]
    for client in clients:
        scheduler.submit(client.job)
    going.set()
    return clients


def test_answers_grow_together_one_token_each_and_do_not_mix(worker, scheduler):
    clients = submit_together(scheduler, answering([10]), answering([20]), answering([30], n_tokens=1))
    assert [client.wait() for client in clients] == [
        [11, 12, 13, ("end", None)],
        [21, 22, 23, ("end", None)],
        [31, ("end", None)],
    ]
    assert worker.rounds == [[[10], [20], [30]], [[11], [21], [31]], [[12], [22]], [[13], [23]]]


def test_a_long_prompt_is_read_in_chunks_while_others_answer(worker, scheduler):
    long = list(range(2 * CHUNK + 5))
    first, second, other = submit_together(scheduler, answering(long, 1), answering([7] * CHUNK, 1), answering([5], 4))
    for client in (first, second, other):
        assert client.wait()[-1] == ("end", None)
    assert first.events[0] == long[-1] + 1
    assert [len(ids) for ids in worker.rounds[0]] == [1, CHUNK]  # two chunks are too many for one round
    assert [sum(len(ids) > 1 for ids in one) for one in worker.rounds[:4]] == [1, 1, 1, 1]
    assert all([6 + n] in one for n, one in enumerate(worker.rounds[1:4]))


def test_a_document_is_read_layer_by_layer_between_answers(worker, scheduler):
    def document(emit):
        yield (yield Compress("", "mill"))

    made, other = submit_together(scheduler, document, answering([5], 2))
    assert made.wait() == ["MILL", ("end", None)]
    assert other.wait() == [6, 7, ("end", None)]
    assert worker.rounds[0] == [[5]]
    assert worker.rounds[1] == "mill"
    assert [[6]] in worker.rounds[2:]  # the answer went on before the document was read
    assert worker.rounds.index([[6]]) < len(worker.rounds) - worker.rounds[::-1].index("mill")


def test_documents_are_read_one_after_the_other(worker, scheduler):
    def document(name):
        def steps(emit):
            yield (yield Compress("", name))

        return steps

    clients = submit_together(scheduler, document("a"), document("b"))
    for client in clients:
        client.wait()
    assert worker.rounds == ["a"] * 3 + ["b"] * 3


def test_a_short_question_does_not_wait_for_a_long_prompt(worker, scheduler):
    long, short = submit_together(scheduler, answering(list(range(4 * CHUNK)), 1), answering([5, 6], 1))
    assert short.wait() == [7, ("end", None)]
    long.wait()
    assert worker.rounds[0] == [[5, 6]]
    assert len(worker.rounds[1]) == 2


def test_documents_that_wait_take_no_place_of_an_answer(worker):
    scheduler = Scheduler(worker, max_active=1, max_waiting=3)
    reading, going = threading.Event(), threading.Event()

    def on_layer():
        reading.set()
        assert going.wait(10)

    worker.on_layer = on_layer

    def document(emit):
        yield (yield Compress("", "mill"))

    documents = [Client(document) for _ in range(3)]
    for client in documents:
        scheduler.submit(client.job)
    assert reading.wait(10)
    answer = Client(answering([5], 1))
    scheduler.submit(answer.job)
    with pytest.raises(APIError) as refused:
        scheduler.submit(Client(document).job)
    assert refused.value.status == 429
    going.set()
    assert answer.wait() == [6, ("end", None)]
    for client in documents:
        client.wait()
    scheduler.close()
    assert worker.rounds[:2] == ["mill", [[5]]]  # it waited for one layer


def test_answers_get_as_much_time_as_the_layers_of_a_document(worker, scheduler, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kvpress_moe.serve.scheduler.time.perf_counter", lambda: now[0])

    def take(seconds):
        now[0] += seconds

    worker.layers, worker.on_layer, worker.on_read = 12, lambda: take(1.0), lambda: take(4.0)

    def document(emit):
        yield (yield Compress("", "mill"))

    made, answer = submit_together(scheduler, document, answering([5], 30))
    made.wait()
    answer.wait()
    first, last = worker.rounds.index("mill"), len(worker.rounds) - worker.rounds[::-1].index("mill")
    between = sum(one != "mill" for one in worker.rounds[first:last])
    assert 2 <= between <= 4  # 12 seconds of reading, rounds of 4 seconds


def test_a_document_whose_client_is_gone_is_read_no_further(worker, scheduler):
    def document(emit):
        yield (yield Compress("", "mill"))

    client = Client(document)
    worker.on_layer = client.job.cancel
    scheduler.submit(client.job)
    other = Client(answering([5], 1))
    scheduler.submit(other.job)
    assert other.wait() == [6, ("end", None)]
    scheduler.close()
    assert worker.rounds.count("mill") == 1
    assert worker.documents == []


def test_a_cancelled_answer_ends_and_frees_what_it_holds(worker, scheduler):
    freed = threading.Event()

    def steps(emit):
        try:
            yield from answering([5], 1000)(emit)
        finally:
            freed.set()

    client = Client(steps)
    worker.on_read = lambda: len(worker.rounds) == 3 and client.job.cancel()
    scheduler.submit(client.job)
    assert freed.wait(10)
    assert len(worker.rounds) == 3


def test_a_failure_in_a_round_is_told_to_all_in_it_and_others_go_on(worker, scheduler, caplog):
    def fail():
        worker.on_read = lambda: None
        raise MemoryError("full")

    worker.on_read = fail
    clients = submit_together(scheduler, answering([5]), answering([6]))
    for client in clients:
        ((kind, error),) = client.wait()
        assert (kind, type(error), error.status) == ("error", APIError, 500)  # which of them failed is not known
    after = Client(answering([7], 1))
    scheduler.submit(after.job)
    assert after.wait() == [8, ("end", None)]


def test_a_job_may_go_on_without_a_document_that_fails(worker, scheduler):
    def steps(emit):
        try:
            yield Compress("", "mill")
        except OSError:
            yield "without"

    def fail():
        raise OSError("no space")

    worker.on_layer = fail
    client = Client(steps)
    scheduler.submit(client.job)
    assert client.wait() == ["without", ("end", None)]


def test_jobs_that_wait_are_started_in_order_and_too_many_are_refused(worker):
    scheduler = Scheduler(worker, max_active=1, max_waiting=2)
    going = held(scheduler)
    clients = [Client(answering([n], 1)) for n in (10, 20)]
    for client in clients:
        scheduler.submit(client.job)
    with pytest.raises(APIError) as refused:
        scheduler.submit(Client(answering([30])).job)
    assert refused.value.status == 429
    clients[0].job.cancel()
    scheduler.submit(Client(answering([40], 1)).job)  # one that waited is gone
    going.set()
    assert clients[1].wait() == [21, ("end", None)]
    scheduler.close()
    assert worker.rounds == [[[20]], [[21]], [[40]], [[41]]]


def test_a_scheduler_that_closes_finishes_what_is_there_and_takes_no_more(worker):
    scheduler = Scheduler(worker)
    going = held(scheduler)
    client = Client(answering([5], 2))
    scheduler.submit(client.job)
    threading.Timer(0.05, going.set).start()
    scheduler.close()
    assert client.events == [6, 7, ("end", None)]
    with pytest.raises(APIError, match="shutting down"):
        scheduler.submit(client.job)


def test_a_scheduler_that_closes_drops_what_takes_too_long(worker):
    scheduler = Scheduler(worker)
    scheduler.submit(Client(answering([5], 10**9)).job)
    started = time.monotonic()
    scheduler.close(timeout=0.1)
    assert time.monotonic() - started < 5
    assert scheduler.n_active == 0


def test_reads_are_asked_for_in_chunks():
    asked = read_in_chunks(None, list(range(CHUNK + 3)))
    first = next(asked)
    second = asked.send(torch.tensor([0.0]))
    assert [len(one.input_ids) for one in (first, second)] == [CHUNK, 3]
    assert isinstance(second, Read)
    with pytest.raises(StopIteration) as end:
        asked.send(torch.tensor([1.0]))
    assert end.value.value.tolist() == [1.0]
