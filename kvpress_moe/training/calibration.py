"""Calibration: measure on new prompts how much each of them loses, and make promises of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpress_moe.benchmark.measured_prompt import MeasuredPrompt
from kvpress_moe.benchmark.prompts import Prompt, encode
from kvpress_moe.benchmark.tasks import make_sample
from kvpress_moe.budget.allocation import MIN_PAIRS
from kvpress_moe.errors import CheckpointError, NotFiniteError, SettingError
from kvpress_moe.files import parse_json
from kvpress_moe.model.fingerprint import model_fingerprint
from kvpress_moe.press.moe_router_press import MoERouterPress
from kvpress_moe.press.promised_budget import setting_of
from kvpress_moe.routers import Routers
from kvpress_moe.routers.checkpoint import weights_hash
from kvpress_moe.routers.promise import Estimate, Promise, points_to_fit
from kvpress_moe.training.config import TrainingConfig

#: Shares of the bytes of a 16-bit cache at which the KL divergence is measured.
BYTE_SHARES = (0.01, 0.016, 0.025, 0.035, 0.05, 0.07, 0.1, 0.14, 0.2, 0.28, 0.4)
#: Shares of the pairs, without a precision.
PAIR_SHARES = (0.02, 0.04, 0.07, 0.11, 0.17, 0.25, 0.36, 0.5, 0.7)
#: Kinds of the built-in prompts: those that routers are trained with, and two that training never sees. Routers are
#: better on kinds that they know, so a promise has to know others too.
KINDS = (*TrainingConfig().tasks, "variable_tracking", "code")
#: Lengths of the built-in prompts in turn, as parts of the given length.
LENGTHS = (1.0, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Measurement:
    """
    What was measured on one prompt with one press.

    Attributes
    ----------
    features : list of F float
        See :class:`kvpress_moe.routers.sight.Sight`.
    lost, divergences : list of K float
        At the shares of the press.
    """

    features: list[float]
    lost: list[float]
    divergences: list[float]


def shares_of(press: MoERouterPress) -> tuple[float, ...]:
    """The shares at which a press is measured."""
    return PAIR_SHARES if press.precision is None else BYTE_SHARES


def task_prompts(tokenizer: PreTrainedTokenizerBase, n: int, length: int, seed: int, limit: int) -> list[Prompt]:
    """
    Prompts of ``KINDS``, of the tune split, which training does not use.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    n : int
    length : int
        Tokens of the contexts; see ``LENGTHS``.
    seed : int
    limit : int
        Longest prompt that the model can read.
    """

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    rounds = -(-n // len(KINDS))
    order = [(index, task) for index in range(rounds) for task in KINDS]
    Random(f"{seed}/calibration").shuffle(order)  # so that any number of prompts is a fair sample
    found = []
    for index, task in order[:n]:
        room = min(int(length * LENGTHS[index % len(LENGTHS)]), limit - 256)
        found.append(encode(make_sample(task, count_tokens, room, index, seed, "tune"), tokenizer))
    return found


def measure(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    presses: Mapping[str, MoERouterPress],
    store: Path | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, list[Measurement]]:
    """
    Measure prompts with each press.

    Parameters
    ----------
    model : PreTrainedModel
    prompts : sequence of Prompt
    presses : mapping of str -> MoERouterPress
        All with the same routers.
    store : Path, optional
        A file of JSON lines. What it holds of these prompts is not measured again.
    progress : callable
        ``progress(done, total)``.
    """
    known = {} if store is None else dict(_read(store))
    about = _about(model, presses)
    found: dict[str, list[Measurement]] = {name: [] for name in presses}
    for number, prompt in enumerate(prompts):
        progress(number, len(prompts))
        key = _digest(prompt, about)
        if key not in known:
            known[key] = _measure(model, prompt, presses)
            if store is not None:
                _append(store, {"key": key, "presses": known[key]})
        for name, one in known[key].items():
            found[name].append(Measurement(**one))
    progress(len(prompts), len(prompts))
    return found


def _measure(model: PreTrainedModel, prompt: Prompt, presses: Mapping[str, MoERouterPress]) -> dict[str, Any]:
    fresh = {name: new_press(press) for name, press in presses.items()}  # without the feedback of other prompts
    measured = MeasuredPrompt(model, prompt, fresh)
    requests = [(name, share) for name, press in presses.items() for share in shares_of(press)]
    found = measured.divergences(requests)
    if not bool(found.isfinite().all()):
        raise NotFiniteError(
            f"calibration: a prompt of {prompt.context.shape[1]} tokens has a KL divergence that is not finite, "
            "expected finite numbers. Load the model in float32 or bfloat16."
        )
    divergences = iter(found.tolist())
    return {
        name: {
            "features": [round(x, 5) for x in measured.sights[name].features.tolist()],
            "lost": [float(f"{x:.5g}") for x in measured.sights[name].lost(torch.tensor(shares_of(press))).tolist()],
            "divergences": [float(f"{next(divergences):.5g}") for _ in shares_of(press)],
        }
        for name, press in presses.items()
    }


def new_press(press: MoERouterPress) -> MoERouterPress:
    """A press with the same routers and precision, which has seen no prompt."""
    router = press.router if press.routers is None else press.routers  # which need not be read from a file once more
    return MoERouterPress(router=router, precision=press.precision, cache_aware=press.cache_aware)


def _about(model: PreTrainedModel, presses: Mapping[str, MoERouterPress]) -> str:
    """Hash of what a measurement depends on beside its prompt: the model, the routers, precisions and shares."""
    found = hashlib.sha256()
    precisions = sorted((name, str(press.precision)) for name, press in presses.items())
    settings = [precisions, BYTE_SHARES, PAIR_SHARES, MIN_PAIRS]
    routers = next(iter(presses.values())).routers
    assert routers is not None
    found.update(json.dumps([model_fingerprint(model), settings, weights_hash(routers)]).encode())
    return found.hexdigest()


def _digest(prompt: Prompt, about: str) -> str:
    ids = [part.tolist() for part in (prompt.context, prompt.question, prompt.answer)]
    return hashlib.sha256(json.dumps([ids, about]).encode()).hexdigest()[:16]


def _append(store: Path, record: dict[str, Any]) -> None:
    """Add a line. What an interrupted run left of its last line is cut off."""
    if store.exists():
        with store.open("r+b") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
    with store.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _read(store: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not store.exists():
        return
    complete, _, _ = store.read_text(encoding="utf-8").rpartition("\n")  # the last line may be half a line
    for line in complete.splitlines():
        try:
            record = parse_json(line)
            yield record["key"], record["presses"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"shards: {store} cannot be read ({type(error).__name__}), expected lines that `calibrate` wrote. "
                "Delete the file; it is made again."
            ) from error


def tensors(measured: Sequence[Measurement]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, F), losses (N, K) and divergences (N, K), float64."""
    return tuple(  # type: ignore[return-value]
        torch.tensor([getattr(one, name) for one in measured], dtype=torch.float64)
        for name in ("features", "lost", "divergences")
    )


def promise(
    press: MoERouterPress,
    measured: Sequence[Measurement],
    fitted: Sequence[Measurement] | None,
    earlier: Promise | None,
    about: Mapping[str, Any],
    adapting: Sequence[Measurement] = (),
) -> Promise:
    """
    A promise for the settings of a press.

    Parameters
    ----------
    press : MoERouterPress
        It has seen the model.
    measured : sequence of Measurement
        The calibration prompts.
    fitted : sequence of Measurement or None
        Prompts to fit the estimate to, others than the calibration prompts. None: the earlier estimate stays.
    earlier : Promise or None
        What the routers promised before.
    about : mapping
        ``prompts`` and ``seed``, which are noted.
    adapting : sequence of Measurement
        Prompts to adapt the estimate to, others than the calibration prompts. Without any it is the one that was
        fitted, even if an earlier calibration adapted it.
    """
    shares = torch.tensor(shares_of(press), dtype=torch.float64)
    features, lost, divergences = tensors(measured)
    if fitted is not None:
        estimate = Estimate.fit(*tensors(fitted), shares)
    else:
        assert earlier is not None
        estimate, shares = earlier.unadapted or earlier.estimate, earlier.shares
    unadapted = None
    if adapting:
        unadapted, estimate = estimate, estimate.adapted(*tensors(adapting), shares)
    settings = {name: getattr(press, name) for name in ("min_share", "top_k", "capacity_factor")}
    settings["min_pairs"] = MIN_PAIRS
    versions = {name: version(name) for name in ("kvpress-moe", "torch", "transformers")}
    own = {"precision": setting_of(press.menu), **settings, "routers": weights_hash(cast(Routers, press.routers))}
    noted = {**own, **about, "adapted_to": len(adapting), "versions": versions}
    return Promise.of(estimate, features, lost, divergences, shares, noted, unadapted)


def calibrate(
    model: PreTrainedModel,
    routers: Routers,
    precisions: Sequence[Any],
    prompts: Sequence[Prompt],
    to_fit: Callable[[], Sequence[Prompt]],
    about: Mapping[str, Any],
    refit: bool = False,
    shards: Path | None = None,
    progress: Callable[[str, int, int], Any] = lambda what, done, total: None,
    adapt: Sequence[Prompt] = (),
) -> dict[str, Promise]:
    """
    Calibrate routers: their promises for some precisions, by the precision's name.

    Parameters
    ----------
    model : PreTrainedModel
    routers : Routers
        They are not changed.
    precisions : sequence
        As in ``MoERouterPress(precision=…)``.
    prompts : sequence of Prompt
        The calibration prompts. Neither training nor the fit of the estimate may have seen them.
    to_fit : callable
        Makes the prompts that an estimate is fitted to, if the routers have none. Those that are also among the
        calibration prompts, or those to adapt to, are left out.
    about : mapping
        ``prompts`` and ``seed``, which are noted.
    refit : bool
        Whether to fit an estimate even if there is one.
    shards : Path, optional
        Directory for measurements. An interrupted run continues from it.
    progress : callable
        ``progress(what, done, total)``.
    adapt : sequence of Prompt
        Prompts like the calibration prompts, but others. The estimate is adapted to them.
    """
    presses = {
        str(precision): MoERouterPress(router=routers, precision=precision, cache_aware=False)
        for precision in precisions
    }
    for press in presses.values():
        press.post_init_from_model(model)
        if press.scope != "global":
            raise SettingError("router", press.scope, "trained routers, whose heads share a budget", "Train some.")
    names = {name: setting_of(press.menu) for name, press in presses.items()}
    store = None
    if shards is not None:
        shards.mkdir(parents=True, exist_ok=True)
        store = shards / "measured.jsonl"
    known = {name for name in presses if _has_estimate(routers.promises.get(names[name]), presses[name])}
    new = {name: press for name, press in presses.items() if refit or name not in known}
    fitted: dict[str, list[Measurement]] = {}
    if new:
        held = {_digest(prompt, "") for prompt in (*prompts, *adapt)}  # of few texts, some prompts are made twice
        others = [prompt for prompt in to_fit() if _digest(prompt, "") not in held]
        fitted = measure(model, others, new, store, lambda done, total: progress("fitting", done, total))
    adapting: dict[str, list[Measurement]] = {}
    if adapt:
        adapting = measure(model, adapt, presses, store, lambda done, total: progress("adapting", done, total))
        for found in adapting.values():
            points_to_fit(tensors(found)[2], "adapt")  # before the calibration, which takes much longer
    measured = measure(model, prompts, presses, store, lambda done, total: progress("calibrating", done, total))
    return {
        names[name]: promise(
            press, measured[name], fitted.get(name), routers.promises.get(names[name]), about, adapting.get(name, ())
        )
        for name, press in presses.items()
    }


def _has_estimate(earlier: Promise | None, press: MoERouterPress) -> bool:
    return earlier is not None and earlier.shares.tolist() == list(shares_of(press))
