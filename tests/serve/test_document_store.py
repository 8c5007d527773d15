"""Documents are there as a whole or not at all, survive a restart, and leave memory but not the disk."""

import json

import pytest

from kvpress_moe import MoERouterPress
from kvpress_moe.errors import CheckpointError, WriteError
from kvpress_moe.serve import document_store
from kvpress_moe.serve.document_store import DocumentStore
from tests.tiny import prefill, tokens


def press():
    return MoERouterPress(0.5, experts=["expected_attention"], budget="global")


def add(store, model, seed, prefix=None):
    made, input_ids = press(), tokens(60, seed=seed)
    cache = prefill(model, input_ids, made)
    return store.add(f"text {seed}", prefix or f"text {seed}", input_ids[0].tolist(), cache, made)


@pytest.fixture
def store(llama, tmp_path):
    return DocumentStore(tmp_path, llama, "recipe", 2**30)


def test_a_document_is_found_again_after_a_restart(llama, store, tmp_path):
    document = add(store, llama, 1)
    again = DocumentStore(tmp_path, llama, "recipe", 2**30)
    assert again.documents() == [document]
    assert again.n_held == 0
    kept = [layer.lengths for layer in store.cache(document).layers]
    assert [layer.lengths for layer in again.cache(document).layers] == kept
    assert again.n_held == 1


def test_documents_of_another_recipe_are_not_shown(llama, store, tmp_path):
    document = add(store, llama, 1)
    other = DocumentStore(tmp_path, llama, "another", 2**30)
    assert other.documents() == []
    assert other.find(document.id) is None
    assert other.id_of("text 1") != document.id


def test_the_least_recently_used_leave_memory_and_are_read_again(llama, store, tmp_path):
    size = add(store, llama, 0).n_bytes
    small = DocumentStore(tmp_path, llama, "recipe", int(2.5 * size))
    documents = [add(small, llama, seed) for seed in range(3)]
    assert small.n_held == 2
    assert small.n_evicted == 1
    small.cache(documents[1])
    small.cache(documents[0])  # read from the disk; the third leaves
    assert small.n_held == 2
    assert small.held_bytes <= 2.5 * size
    assert set(small._caches) == {documents[0].id, documents[1].id}


def test_a_text_is_recognised_by_its_longest_prefix(llama, store):
    short, long = add(store, llama, 1, "The mill"), add(store, llama, 2, "The mill of the")
    assert store.longest_prefix("The mill of the town") == long
    assert store.longest_prefix("The mill on the hill") == short
    assert store.longest_prefix("The mill") is None  # nothing would be left to read
    assert store.longest_prefix("A mill of the town") is None


def test_a_deleted_document_is_gone_from_memory_and_disk(llama, store, tmp_path):
    document = add(store, llama, 1)
    assert store.delete(document.id)
    assert not store.delete(document.id)
    assert store.documents() == []
    assert store.n_held == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", ["save_cache", "write_atomically"])
def test_a_write_that_fails_leaves_no_document(llama, store, monkeypatch, fails):
    def fail(*_):
        raise WriteError("no space")

    monkeypatch.setattr(document_store, fails, fail)
    with pytest.raises(WriteError):
        add(store, llama, 1)
    assert store.documents() == []
    monkeypatch.undo()
    document = add(store, llama, 1)
    assert store.documents() == [document]


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"recipe": "recipe", "id": 3}', '{"recipe": "recipe", "id": "x"}', "kept"]
)
def test_a_broken_card_is_left_out(llama, store, tmp_path, content, caplog):
    document = add(store, llama, 1)
    if content == "kept":
        report = {"full_bytes": 1, "read_seconds": 1, "kept": [], "max_kl": None, "expected_kl": None}
        card = json.loads((tmp_path / f"{document.id}.json").read_text())
        content = json.dumps(card | {"report": report | {"is_promised": None}})
    (tmp_path / f"{document.id}.json").write_text(content)
    assert store.documents() == []
    assert store.find("../" + document.id) is None


def test_cards_of_deleted_documents_are_forgotten(llama, store, tmp_path):
    document, kept = add(store, llama, 1), add(store, llama, 2)
    assert len(store.documents()) == 2
    (tmp_path / f"{document.id}.json").unlink()  # as another server does
    assert store.documents() == [kept]
    assert set(store._cards) == {kept.id}


def test_what_a_killed_server_left_is_swept_after_an_hour(llama, store, tmp_path):
    document = add(store, llama, 1)
    left = [tmp_path / name for name in (f"doc-{'0' * 24}.kv", f".doc-{'1' * 24}.kv.abc", f".doc-{'2' * 24}.json.x")]
    other = tmp_path / "notes.txt"
    for path in (*left, other):
        path.write_text("half")
    store.sweep()
    assert all(path.exists() for path in left)  # another server may be writing them now
    store.sweep(older_than=-1)
    assert not any(path.exists() for path in left)
    assert other.exists()
    assert store.documents() == [document]


def test_the_oldest_beginnings_of_chats_leave_the_disk(llama, store, monkeypatch):
    monkeypatch.setattr(document_store, "MOST_PREFIXES", 2)
    document = add(store, llama, 0)
    made = press()
    cache = prefill(llama, tokens(60), made)
    for number in range(4):
        monkeypatch.setattr(document_store.time, "time", lambda number=number: 2e9 + number)
        store.add("", f"prefix {number}", tokens(60)[0].tolist(), cache, made, "prefix")
    assert store.documents() == [document]
    assert store.longest_prefix("prefix 1 and more") is None
    assert store.longest_prefix("prefix 3 and more").kind == "prefix"


def test_a_broken_cache_is_refused_by_name(llama, store, tmp_path):
    document = add(store, llama, 1)
    (tmp_path / f"{document.id}.kv").write_bytes(b"nothing")
    again = DocumentStore(tmp_path, llama, "recipe", 2**30)
    with pytest.raises(CheckpointError, match="cache"):
        again.cache(again.documents()[0])
