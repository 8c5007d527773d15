"""
Every model family in every situation: works, or is refused by an error that names the limit.

    python -m tests.integration.matrix    # runs all cells and writes docs/compatibility.md (`make matrix`)

:mod:`tests.integration.test_matrix` runs the cells too, and fails where the page says something else.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from kvpress.pipeline import KVPressTextGenerationPipeline
from kvpress.utils import compute_n_kept
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from kvpress_moe import MoERouterPress
from kvpress_moe.cache import PackedLayer, RaggedLayer
from kvpress_moe.errors import KVPressMoEError
from kvpress_moe.model.layers import slides
from kvpress_moe.model.transformers_api import crop
from tests.tiny import byte_tokenizer, decoder, greedy, padded_tokens, prefill, tiny_model, tokens

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
PROMPT, N_NEW, RATIO = 100, 5, 0.5
PADDED = (100, 77, 93, 30)

#: Family of tests/tiny.py -> the model class that it stands for.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen2_sliding": "Qwen2 (later layers slide)",
    "qwen3_sliding": "Qwen3 (last layer slides)",
    "ministral": "Ministral",
    "phi3": "Phi-3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "gemma3": "Gemma 3 (multimodal)",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
}

WORKS, NOT_RUN = "yes", "–"


class NotRun(Exception):
    """A cell that cannot be run here, or says nothing."""


def press(budget: str = "uniform", **settings) -> MoERouterPress:
    """One that judges by queries, keys and attention; without feedback, so that it does the same twice."""
    experts = ["expected_attention", "keydiff", "selective", "tova"]
    return MoERouterPress(RATIO, experts=experts, budget=budget, cache_aware=False, **settings)


def generated(model: PreTrainedModel, input_ids: Tensor, given: MoERouterPress | None = None, **settings) -> Tensor:
    """The new tokens (B, N) of greedy search under a press."""
    with (given or press())(model):
        output = model.generate(input_ids, max_new_tokens=N_NEW, do_sample=False, **settings)
    return output[:, input_ids.shape[1] :]


def same(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one, other), f"{one.tolist()} instead of {other.tolist()}"


def check_generation(model: PreTrainedModel, given: MoERouterPress) -> None:
    """``generate`` answers as a loop of our own does that goes on from the compressed cache."""
    ids = tokens(PROMPT)
    answer = generated(model, ids, given)
    cache = prefill(model, ids, given, DynamicCache(config=model.config))
    same(answer[:, 1:], greedy(model, answer[:, :1], cache, PROMPT, N_NEW - 1))


def check_rows(model: PreTrainedModel, n_tokens: tuple[int, ...], given: MoERouterPress) -> None:
    """Every row of a batch answers as it answers alone."""
    ids, mask = padded_tokens(n_tokens)
    together = generated(model, ids, given, attention_mask=mask)
    alone = [generated(model, tokens(length, seed=row), given) for row, length in enumerate(n_tokens)]
    same(together, torch.cat(alone))


# ── situations ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prefill_alone(family: str) -> None:
    model = tiny_model(family)
    cache = prefill(model, tokens(PROMPT), press(), DynamicCache(config=model.config))
    for index, layer in enumerate(cache.layers):
        if not slides(decoder(model).config, index):
            assert layer.keys.shape[2] == compute_n_kept(PROMPT, RATIO)


def prefill_shared(family: str) -> None:
    cache = prefill(tiny_model(family), tokens(PROMPT), press("global"))
    layers = [layer for layer in cache.layers if isinstance(layer, RaggedLayer)]
    n_heads = sum(len(layer.lengths[0]) for layer in layers)
    assert sum(sum(layer.lengths[0]) for layer in layers) == n_heads * compute_n_kept(PROMPT, RATIO)


def prefill_mixed(family: str) -> None:
    model, ids = tiny_model(family), tokens(PROMPT)
    full, cache = prefill(model, ids), prefill(model, ids, press("global", precision="mixed"))
    packed = [index for index, layer in enumerate(cache.layers) if isinstance(layer, PackedLayer)]
    whole = sum(full.layers[index].keys.nbytes + full.layers[index].values.nbytes for index in packed)
    taken = sum(cache.layers[index].nbytes for index in packed)
    assert packed
    assert 0.97 * (1 - RATIO) * whole < taken <= (1 - RATIO) * whole


def several_questions(family: str) -> None:
    ask = KVPressTextGenerationPipeline(model=tiny_model(family), tokenizer=byte_tokenizer())
    context, questions = "The crane lifts twelve tons. " * 4, ["Who lifts?", "How much does it lift?"]
    for budget in ("uniform", "global"):
        both = ask(context, questions=questions, press=press(budget), max_new_tokens=N_NEW)["answers"]
        single = [ask(context, question=q, press=press(budget), max_new_tokens=N_NEW)["answer"] for q in questions]
        assert both == single, f"{both} instead of {single}"


def beam_search(family: str) -> None:
    model = tiny_model(family)
    for budget in ("uniform", "global"):
        assert generated(model, tokens(PROMPT, 2), press(budget), num_beams=2).shape == (2, N_NEW)


def whole_history(family: str) -> None:
    """``generate`` with the whole history and a compressed cache goes on as a loop of our own does."""
    model, question = tiny_model(family), tokens(9, seed=5)
    for budget in ("uniform", "global"):
        cache = prefill(model, tokens(PROMPT), press(budget))
        expected = greedy(model, question, copy.deepcopy(cache), PROMPT, N_NEW)
        history = torch.cat([tokens(PROMPT), question], 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")
            written = model.generate(history, past_key_values=cache, max_new_tokens=N_NEW, do_sample=False)
        same(written[:, history.shape[1] :], expected)


def cropped(family: str) -> None:
    """Back to the prompt and on again, as if nothing had come in between."""
    model = tiny_model(family)
    for budget in ("uniform", "global"):
        cache = prefill(model, tokens(PROMPT), press(budget))
        expected = greedy(model, tokens(3, seed=2), copy.deepcopy(cache), PROMPT, N_NEW)
        greedy(model, tokens(5, seed=3), cache, PROMPT, 3)
        crop(cache, PROMPT)
        assert cache.get_seq_length() == PROMPT
        same(greedy(model, tokens(3, seed=2), cache, PROMPT, N_NEW), expected)


def drafted(family: str) -> None:
    generated(tiny_model(family), tokens(PROMPT), prompt_lookup_num_tokens=3)


def image(family: str) -> None:
    if family != "gemma3":
        raise NotRun
    model, ids = tiny_model(family), tokens(PROMPT)
    ids[:, 10:14] = model.config.image_token_id
    picture = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == model.config.image_token_id).long()}
    for budget in ("uniform", "global"):
        assert generated(model, ids, press(budget), **picture).shape == (1, N_NEW)


def padded_right(family: str) -> None:
    model, (ids, mask) = tiny_model(family), padded_tokens(PADDED)
    with press()(model):
        model(ids.flip(1), attention_mask=mask.flip(1))


def eager(budget: str, **settings) -> Callable[[str], None]:
    return lambda family: check_generation(tiny_model(family, attn_implementation="eager"), press(budget, **settings))


def padded_eager(family: str) -> None:
    check_rows(tiny_model(family, attn_implementation="eager"), PADDED, press())


def flex(family: str) -> None:
    try:
        model = tiny_model(family, attn_implementation="flex_attention")
    except ValueError as error:
        raise KVPressMoEError(f"transformers: {error}") from error  # it refuses some classes itself
    check_generation(model, press())


def bfloat16(family: str) -> None:
    check_generation(tiny_model(family, dtype=torch.bfloat16), press())


def compiled(family: str) -> None:
    model = torch.compile(tiny_model(family), backend="eager")
    with press()(model):
        model(tokens(PROMPT))


def decoded_compiled(family: str) -> None:
    if family != "llama":  # seconds each
        raise NotRun
    model = tiny_model(family)
    for budget in ("uniform", "global"):
        caches = [prefill(model, tokens(PROMPT), press(budget)) for _ in range(2)]
        torch.compiler.reset()
        answers = [
            greedy(some, tokens(1, seed=1), cache, PROMPT, 1)
            for some, cache in zip((model, torch.compile(model, backend="eager")), caches, strict=True)
        ]
        same(*answers)


def offloaded_weights(family: str) -> None:
    """accelerate keeps the last layer's weights on disk, and meta tensors in the model."""
    model = tiny_model(family)
    last, places = decoder(model).layers[-1], {}

    def place(module: torch.nn.Module, name: str) -> None:
        if module is last or not any(part is last for part in module.modules()):
            places[name] = "disk" if module is last else "cpu"
            return
        for child_name, child in module.named_children():
            place(child, f"{name}.{child_name}".removeprefix("."))

    place(model, "")
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        load = type(model) if family == "gemma3" else AutoModelForCausalLM
        split = load.from_pretrained(directory, device_map=places, offload_folder=f"{directory}/offloaded")
        assert next(decoder(split).layers[-1].parameters()).is_meta
        for budget in ("uniform", "global"):
            same(generated(split, tokens(PROMPT), press(budget)), generated(model, tokens(PROMPT), press(budget)))


def static_cache(family: str) -> None:
    model = tiny_model(family)
    prefill(model, tokens(PROMPT), press(), StaticCache(config=model.config, max_cache_len=256))


def quantised_cache(budget: str) -> Callable[[str], None]:
    def run(family: str) -> None:
        wide = {"hidden_size": 256, "head_dim": 64, "query_pre_attn_scalar": 64}  # groups of quantisation divide heads
        keep = ("hidden_size", "head_dim", "query_pre_attn_scalar") if family.startswith("gemma") else ("hidden_size",)
        keep = ("hidden_size", "head_dim") if family in ("qwen3", "qwen3_moe", "qwen3_sliding", "ministral") else keep
        model = tiny_model(family, **{name: wide[name] for name in keep})
        cache = QuantizedCache("quanto", model.config.get_text_config(), nbits=4, axis_key=0, axis_value=0)
        prefill(model, tokens(PROMPT), press(budget), cache)
        kept = [layer._dequantize(layer._quantized_keys).shape[2] for layer in cache.layers]
        config = model.config.get_text_config()
        assert kept == [PROMPT if slides(config, i) else compute_n_kept(PROMPT, RATIO) for i in range(len(kept))]
        assert greedy(model, tokens(3, seed=1), cache, PROMPT, 3).shape == (1, 3)

    return run


def on_cuda(family: str) -> None:
    raise NotRun


#: Situation -> what is run for a family. It returns where everything is as it should be, and raises otherwise.
SITUATIONS: dict[str, Callable[[str], None]] = {
    "prefill": prefill_alone,
    "prefill, heads share the budget": prefill_shared,
    "generate": lambda family: check_generation(tiny_model(family), press()),
    "generate, heads share the budget": lambda family: check_generation(tiny_model(family), press("global")),
    "several questions on one compressed context": several_questions,
    "beam search": beam_search,
    "whole history with a compressed cache": whole_history,
    "crop back to the prompt": cropped,
    "prompt lookup or assisted decoding inside the block": drafted,
    "batch": lambda family: check_rows(tiny_model(family), (PROMPT,) * 3, press()),
    "batch, heads share the budget": lambda family: check_rows(tiny_model(family), (PROMPT,) * 3, press("global")),
    "batch padded on the left": lambda family: check_rows(tiny_model(family), PADDED, press()),
    "batch padded on the left, heads share the budget": lambda family: check_rows(
        tiny_model(family), PADDED, press("global")
    ),
    "prefill, mixed precision": prefill_mixed,
    "generate, mixed precision": lambda family: check_generation(
        tiny_model(family), press("global", precision="mixed")
    ),
    "batch padded on the left, mixed precision": lambda family: check_rows(
        tiny_model(family), PADDED, press("global", precision="mixed")
    ),
    "eager attention, mixed precision": eager("uniform", precision="mixed"),
    "batch padded on the right": padded_right,
    "prompt with an image": image,
    "bfloat16": bfloat16,
    "eager attention": eager("uniform"),
    "eager attention, heads share the budget": eager("global"),
    "eager attention, batch padded on the left": padded_eager,
    "flex attention": flex,
    "torch.compile'd model inside the block": compiled,
    "torch.compile'd model decodes after the block": decoded_compiled,
    "device_map, last layer's weights on disk": offloaded_weights,
    "device_map over two GPUs": on_cuda,
    "static cache": static_cache,
    "quantised cache (quanto)": quantised_cache("uniform"),
    "quantised cache (quanto), heads share the budget": quantised_cache("global"),
    "offloaded cache": on_cuda,
}


def outcome(family: str, situation: str) -> str:
    """``yes``; the first sentence of the error that names the limit; or a dash where nothing was run."""
    try:
        SITUATIONS[situation](family)
    except NotRun:
        return NOT_RUN
    except KVPressMoEError as error:
        return str(error).split(". ")[0] + "."
    return WORKS


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = """# Which models in which situation

Written by `make matrix`, which runs every cell with tiny random models on a CPU (float32 and SDPA attention unless
the row says something else; `tests/integration/matrix.py` says what each row checks). The test-suite runs them too
and fails where this page says something else. `yes`: runs, and gives what it should: the exact number of pairs, the
tokens of a loop over the compressed cache, the tokens that each row of a batch gives alone, the answers that each
question gets alone, the tokens of a model in one piece. A number: refused, by the error whose first sentence stands
below. `–`: not run.
"""

TAIL = """
## Releases of transformers

The table is made with transformers 5.2.0. The press, its caches, the families and the command line are tested with
4.56.0, 5.2.0 and 5.24.0 too (`make lowest`, `make newest`). kvpress 0.5.5 declares `<5.3`, so pip installs 5.2 by
default. For a newer release, install it afterwards:

```bash
pip install . && pip install "transformers==5.24.0"
```

pip then says that kvpress requires an older one, and installs it all the same; `pip check` goes on saying so. With
uv, one line does it: `uv pip install . --override <(echo transformers==5.24.0)`.

What is different with 5.24:

- Assisted decoding and prompt lookup with a cache that holds a prompt already are refused. That release reads the
  whole history again into such a cache, also into a full one, and what it writes is wrong.
- It loads Gemma 2 with eager attention only; then every head keeps the same number of pairs.

Newer families whose attention is that of a supported one are served (Ministral). Others are refused by name: models
with linear attention layers (Qwen3-Next, Qwen3.5), and those whose queries or keys kvpress's scorers would compute
wrongly (Gemma 4, Ministral 3, SmolLM3).

## Not in the table

Not run: what needs CUDA devices (transformers offloads caches from those only), pictures where the family takes none,
and compiled decoding beyond Llama (traced with `backend="eager"`, to save time; Qwen3-MoE does not compile in float32
on a CPU, with or without a press). A map over several devices is stood in for by weights that accelerate fetches from
disk, layer by layer.

What the table does not show:

- A press on the model itself is not seen by a compiled copy of it: `with press(model): torch.compile(model)(prompt)`
  can run code without the hooks and keep the whole prompt, without a word. Read the prompt with the model itself.
- kvpress does not know the norms of queries and keys of Qwen3-MoE and OLMoE, nor Gemma 2's soft cap. Experts inside
  this press are given the right projections and, with a soft cap, the right attention (`snapkv`, `pyramidkv`,
  `tova`); `expected_attention`, `non_causal`, `compactor` and `cap` estimate attention without the cap. kvpress's own
  presses compute wrong queries for Qwen3-MoE and OLMoE, so that the benchmark refuses these models. kvpress logs that
  classes which it does not list are "not tested"; that is about its own presses.
- transformers' SDPA attention leaves Gemma 2's soft cap out; eager attention applies it. The press follows the
  attention in use.
- `leverage` and `compactor` draw one random sketch for a whole batch, so that a row of an unpadded batch can keep
  other pairs than alone.
- Phi-3 models that rotate only a part of each head (Phi-4 mini): `expected_attention`, `non_causal` and `snapkv` fail
  by name.
"""


def page(outcomes: dict[tuple[str, str], str]) -> str:
    """docs/compatibility.md for what came of every (situation, family)."""
    limits = list(dict.fromkeys(text for text in outcomes.values() if text not in (WORKS, NOT_RUN)))

    def cell(text: str) -> str:
        return f"[{limits.index(text) + 1}]" if text in limits else text

    lines = [HEAD, f"| | {' | '.join(FAMILIES.values())} |", "|---" * (len(FAMILIES) + 1) + "|"]
    for situation in SITUATIONS:
        lines.append(f"| {situation} | {' | '.join(cell(outcomes[situation, family]) for family in FAMILIES)} |")
    lines += ["", *(f"[{number}] {text}  " for number, text in enumerate(limits, start=1))]
    return "\n".join(lines) + "\n" + TAIL


def read_page(text: str) -> dict[tuple[str, str], str]:
    """What a page says of every (situation, family)."""
    limits = dict(line.rstrip().split(" ", 1) for line in text.splitlines() if line.startswith("["))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    return {
        (row[0], family): limits.get(cell, cell)
        for row in rows[1:]
        for family, cell in zip(FAMILIES, row[1:], strict=True)
    }


def main() -> None:
    start = time.perf_counter()
    outcomes = {}
    for situation in SITUATIONS:
        outcomes |= {(situation, family): outcome(family, situation) for family in FAMILIES}
    PAGE.write_text(page(outcomes), encoding="utf-8")
    print(f"{PAGE} written")
    works, not_run = (list(outcomes.values()).count(text) for text in (WORKS, NOT_RUN))
    refused, seconds = len(outcomes) - works - not_run, time.perf_counter() - start
    print(f"{len(outcomes)} cells: {works} work, {refused} are refused by name, {not_run} not run; {seconds:.0f} s")


if __name__ == "__main__":
    main()
