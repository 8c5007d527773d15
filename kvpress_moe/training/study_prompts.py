"""
Study prompts: training prompts that the frozen model makes itself.

Contexts are put together from documents that the model writes, and some prose and code of Python's standard library.
The model asks questions about them, and answers with the full cache. Cartridges (arXiv 2506.06266) calls it self-study.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.cache_eval import step
from kvpress_moe.benchmark.prompts import Prompt, encode
from kvpress_moe.benchmark.tasks.filling import CountTokens, check_room, swept_depth
from kvpress_moe.benchmark.tasks.sample import Sample
from kvpress_moe.benchmark.tasks.texts import modules, sentences, source
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.files import is_number, is_text, is_whole, write_atomically
from kvpress_moe.model.end_tokens import end_tokens
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.model.transformers_api import with_cache
from kvpress_moe.training.own_questions import fixed_question, write_questions
from kvpress_moe.training.written_documents import SUBJECTS, WrittenDocument, density, write_documents

FORMAT = 1  # of the file
ANSWER_TOKENS = 32
DOCUMENTS_PER_PROMPT = 2  # written; each is in several contexts

_INSTRUCTIONS = (
    "",
    "Answer the question using only the documents below.\n\n",
    "",
    "Read the following text carefully. A question about it comes at the end.\n\n",
    "",
    "Below are some texts. Answer briefly, in a few words.\n\n",
    "",
    "Use the given documents to answer the question. Write only the answer.\n\n",
    "You are given an article and a question. Answer as concisely as you can.\n\n",
    "",
    "Context:\n",
)
_QUESTIONS = (
    "{question}",
    "Question: {question}",
    "Based on the text, {question}",
    "Answer the question based on the given documents. Write only the answer.\n\nQuestion: {question}",
    "{question} Answer in one sentence.",
    "This is about {title}. {question}",
    "Now, answer the following question with the text above.\n\n{question}",
)
_ANSWER_PREFIXES = ("", "", " Answer:")


def _documents(documents: Sequence[WrittenDocument], random: Random) -> str:
    return "\n\n".join(f"Document [{n}] (Title: {d.title}) {d.text}" for n, d in enumerate(documents, 1))


def _essay(documents: Sequence[WrittenDocument], random: Random) -> str:
    return "\n\n".join(document.text for document in documents)


def _sections(documents: Sequence[WrittenDocument], random: Random) -> str:
    return "\n\n".join(f"{document.title}\n{document.text}" for document in documents)


def _headed(documents: Sequence[WrittenDocument], random: Random) -> str:
    return "\n\n".join(f"## {document.title}\n\n{document.text}" for document in documents)


def _facts(documents: Sequence[WrittenDocument], random: Random) -> str:
    """Every sentence on its own line, under its title."""
    return "\n\n".join("\n- ".join((f"{d.title}:", *split_sentences(d.text))) for d in documents)


def _shuffled(documents: Sequence[WrittenDocument], random: Random) -> str:
    """The sentences of all documents in one paragraph, without order."""
    pieces = [sentence for document in documents for sentence in split_sentences(document.text)]
    random.shuffle(pieces)
    return " ".join(pieces)


def _passages(documents: Sequence[WrittenDocument], random: Random) -> str:
    return "\n\n".join(f"Passage {n}:\n{d.title}\n{d.text}" for n, d in enumerate(documents, 1))


_LAYOUTS: tuple[Callable[[Sequence[WrittenDocument], Random], str], ...] = (
    _documents,
    _essay,
    _sections,
    _facts,
    _passages,
    _shuffled,
    _headed,
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without line breaks."""
    return re.split(r"(?<=[.!?]) (?=\S)", " ".join(text.split()))


def study_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    length: int,
    seed: int,
    directory: Path,
    progress: Callable[[str, int, int], Any] = lambda description, done, total: None,
) -> list[tuple[str, Prompt]]:
    """
    Let the model make training prompts, with their names.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
    n : int
        Number of prompts.
    length : int
        Longest context, in tokens. The prompts have 8/8, 7/8, 6/8 and 5/8 of it in turn.
    seed : int
    directory : Path
        Directory of the file with everything that was generated. What is already in it is not generated again.
    progress : callable
        ``progress(description, done, total)``.

    Raises
    ------
    CheckpointError
        If the file of an earlier run cannot be read.
    SettingError
        If the length is too short.
    """
    check_room("study prompts", length, 128)
    limit = model.config.get_text_config(decoder=True).max_position_embeddings
    words = hashlib.sha256(f"{type(tokenizer)} {len(tokenizer)} {tokenizer.chat_template}".encode()).hexdigest()
    about = {"format": FORMAT, "model": model_fingerprint(model), "n": n, "length": length, "seed": seed}
    about["tokenizer"] = words  # answers are kept as token ids
    path = directory / f"study-{length}-{n}-{seed}.json"
    made = _read(path, about, int(cast(Any, model.get_input_embeddings()).weight.shape[0]))

    def save() -> None:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(made, indent=1)))

    if "documents" not in made:
        documents = write_documents(
            model,
            tokenizer,
            _subjects(DOCUMENTS_PER_PROMPT * n, seed),
            seed,
            progress=lambda done, total: progress("writing documents", done, total),
        )
        made["documents"] = [asdict(document) for document in documents]
        save()
    documents = [WrittenDocument(**document) for document in made["documents"]]
    asked = _asked(documents, n, seed)
    if "questions" not in made:
        made["questions"] = write_questions(
            model, tokenizer, asked, seed, progress=lambda done, total: progress("writing questions", done, total)
        )
        save()

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    if "samples" not in made:
        samples = [
            _sample(documents, asked[index], made["questions"][index], count_tokens, length, index, seed)
            for index in range(n)
        ]
        made["samples"] = [asdict(sample) for sample in samples]
        made["answers"] = []
        save()
    prompts = []
    for index, values in enumerate(made["samples"]):
        sample = Sample(**{**values, "references": ()})
        prompt = encode(replace(sample, answer=" -"), tokenizer)  # a placeholder: the answer is known as tokens
        if index == len(made["answers"]):
            progress("answering", index, n)
            made["answers"].append(greedy_answer(model, tokenizer, prompt))
            if index % 8 == 7 or index == n - 1:
                save()
        prompt = replace(prompt, answer=torch.tensor([made["answers"][index]]))
        if len(prompt) > limit:
            raise SettingError(
                "length",
                length,
                f"prompts that fit into the model's {limit} tokens ({sample.id} has {len(prompt)})",
                "Ask for shorter prompts, or leave these out with study=0.",
            )
        prompts.append((f"{sample.id}-{_digest(prompt)}", prompt))
    progress("answering", n, n)
    return prompts


def _digest(prompt: Prompt) -> str:
    """Of a prompt's tokens. In its name, so that what was captured of another prompt is never taken for it."""
    ids = [part.tolist() for part in (prompt.context, prompt.question, prompt.answer)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def _read(path: Path, about: dict[str, Any], n_words: int) -> dict[str, Any]:
    """What a file holds, if it was made for the same prompts; else only what it is about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"about": about}
    try:
        made: dict[str, Any] = json.loads(path.read_text())
        same = made["about"] == json.loads(json.dumps(about))
        if same:
            _check(made, about["n"], n_words)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"study prompts: {path} cannot be read ({type(error).__name__}: {str(error)[:200]}), expected a file that "
            "`train` wrote. Delete it; it is made again."
        ) from error
    return made if same else {"about": about}


def _check(made: dict[str, Any], n: int, n_words: int) -> None:
    """Raise ValueError unless everything in a file has the form that :func:`study_prompts` writes."""
    documents, questions = made.get("documents", []), made.get("questions", [None] * n)
    samples: Any = made.get("samples")
    answers: Any = made.get("answers")
    if not _is_list(documents, lambda one: set(one) == {"title", "text"} and all(map(is_text, one.values())), dict):
        raise ValueError("documents: expected a title and a text for each")
    if not _is_list(questions, lambda one: one is None or is_text(one)) or len(questions) != n:
        raise ValueError(f"questions: expected {n} texts or null")
    if samples is None and answers is None:
        return
    names = {field.name for field in fields(Sample)}
    texts = ("task", "split", "context", "question", "answer_prefix", "answer")

    def is_sample(one: dict[str, Any]) -> bool:
        whole = all(is_whole(one[name]) for name in ("index", "length")) and is_number(one["depth"])
        return whole and one["chat"] is True and one["metric"] == "tokens" and all(is_text(one[name]) for name in texts)

    if not _is_list(samples, lambda one: set(one) == names and is_sample(one), dict) or len(samples) != n:
        raise ValueError(f"samples: expected {n}, each with {', '.join(sorted(names))}")
    if (
        not _is_list(answers, lambda one: one and all(is_whole(t) and t < n_words for t in one), list)
        or len(answers) > n
    ):
        raise ValueError(f"answers: expected at most {n} lists of token ids below {n_words}")


def _is_list(found: Any, is_right: Callable[[Any], Any], of_type: type = object) -> bool:
    """Whether something is a list whose entries have a type and are right."""
    return isinstance(found, list) and all(isinstance(one, of_type) and is_right(one) for one in found)


def _subjects(n: int, seed: int) -> list[str]:
    """Subjects from a start that depends on the seed. If there are too few, they come again in other forms."""
    start = Random(seed).randrange(len(SUBJECTS))
    return [SUBJECTS[(start + number) % len(SUBJECTS)] for number in range(n)]


def _asked(documents: Sequence[WrittenDocument], n: int, seed: int) -> list[WrittenDocument]:
    """The document of each prompt's question: every eighth is a passage of other text."""
    order = sorted(documents, key=lambda document: -density(document.text))
    random = Random(f"{seed}/asked")
    chosen = order[: max(n, len(order) // 2)] or [WrittenDocument("The model", "It wrote nothing.")]
    random.shuffle(chosen)
    others = [_other_text(random) for _ in range(n)]
    return [others[index] if index % 8 == 5 else chosen[index % len(chosen)] for index in range(n)]


def _other_text(random: Random) -> WrittenDocument:
    """Consecutive sentences of the language reference, or the docstring and first lines of a module."""
    if random.random() < 0.6:
        prose = sentences("train")
        start = random.randrange(len(prose) - 8)
        return WrittenDocument("The Python language", " ".join(prose[start : start + random.randint(4, 8)]))
    name = random.choice(modules("train"))
    text = source(name)
    start = text.find("\n", random.randrange(max(1, len(text) - 900))) + 1
    return WrittenDocument(f"{name}.py", text[start : start + random.randint(400, 900)].rstrip())


def _sample(
    documents: Sequence[WrittenDocument],
    asked: WrittenDocument,
    question: str | None,
    count_tokens: CountTokens,
    length: int,
    index: int,
    seed: int,
) -> Sample:
    """A prompt as text, without its answer."""
    random = Random(f"{seed}/study/{length}/{index}")
    room = length - (index % 4) * length // 8
    depth = swept_depth(index)
    instruction = _INSTRUCTIONS[index % len(_INSTRUCTIONS)]
    others = [document for document in documents if document != asked]
    random.shuffle(others)
    if index // 4 % 3 == 2:
        others = [_other_text(random) if number % 2 else document for number, document in enumerate(others)]
    layout = _LAYOUTS[index % len(_LAYOUTS)]

    def context(fillers: Sequence[WrittenDocument]) -> str:
        at = round(depth * len(fillers))
        return instruction + layout([*fillers[:at], asked, *fillers[at:]], Random(index))

    fillers: list[WrittenDocument] = []
    while count_tokens(context(fillers)) < room:
        fillers.append(others.pop() if others else _other_text(random))
    text = context(_cut(fillers, lambda some: count_tokens(context(some)) <= room))
    while count_tokens(text) > room:  # one document alone is longer: a short length, or a tokenizer of bytes
        text = text[: len(text) * room // count_tokens(text)]
    wording = _QUESTIONS[index % len(_QUESTIONS)]
    asks = wording.format(question=question or fixed_question(asked.title, random), title=asked.title)
    prefix = _ANSWER_PREFIXES[index % len(_ANSWER_PREFIXES)]
    return Sample("study", "train", length, index, text, asks, prefix, "", (), "tokens", depth=depth)


def _cut(fillers: list[WrittenDocument], fits: Callable[[Sequence[WrittenDocument]], bool]) -> list[WrittenDocument]:
    """Shorten the last filler, or leave it out, until the context fits."""
    if not fillers or fits(fillers):
        return fillers
    *rest, last = fillers
    words = re.findall(r"\S+\s*", last.text)
    low, high = 0, len(words)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits([*rest, _first(last, words, middle)]) else (low, middle)
    return [*rest, _first(last, words, low)] if low > 4 else rest


def _first(document: WrittenDocument, words: Sequence[str], n_words: int) -> WrittenDocument:
    return replace(document, text="".join(words[:n_words]).rstrip())


@torch.no_grad()
def greedy_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens that the model answers with the full cache: at least one, at most ``ANSWER_TOKENS``."""
    ends = end_tokens(model, tokenizer)
    cache = DynamicCache()
    model.model(input_ids=prompt.context.to(model.device), **with_cache(cache))
    tokens = prompt.question.to(model.device)
    answer: list[int] = []
    for _ in range(ANSWER_TOKENS):
        logits = step(model, cache, tokens, cache.get_seq_length(), None, 1)[:, -1]
        if not answer:
            logits[:, list(ends)] = -torch.inf
        token = int(logits.argmax(-1))
        if token in ends:
            break
        answer.append(token)
        tokens = torch.tensor([[token]], device=model.device)
    return answer
