"""Training config: everything that determines trained routers, besides the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvpress_moe.benchmark.tasks import TASKS, find_tasks
from kvpress_moe.errors import SettingError
from kvpress_moe.experts.registry import make_expert
from kvpress_moe.files import is_number, is_whole
from kvpress_moe.training.losses import TEACHERS

#: Kinds of tasks that training never sees, so that the benchmark can tell learning from memorising.
HELD_OUT = ("variable_tracking", "code", "dialogue", "json_records", "comparing", "cloze")

#: Fields of what comes after the layer-by-layer fit.
_END_TO_END = ("end_to_end", "end_to_end_rate", "replay_weight", "coded_share", "transform_prompts", "long_samples")

LONGEST = 3  # length of the longest long prompt, times that of the others
REACH = 1.25  # where scores begin to decay, times the length of the other prompts


@dataclass(frozen=True)
class TrainingConfig:
    """
    Everything that determines trained routers, besides the model.

    Parameters
    ----------
    experts : tuple of str
        Names of experts; ``"learned"`` is a part of the router itself.
    top_k : int
        Experts per token. The press must use the same number.
    samples : int
        Number of prompts of the tasks.
    study : int
        Number of prompts that the model makes itself, see
        :func:`kvpress_moe.training.study_prompts.study_prompts`.
    length : int
        Longest context, in tokens. The prompts have 8/8, 7/8, 6/8 and 5/8 of it in turn.
    tasks : tuple of str
        Kinds of prompts: tasks of the benchmark, or ``all`` alone. The prompts are of its train split.
    teacher : {"replay", "answer", "both"}
        Whose attention is learned; see :func:`kvpress_moe.training.losses.target`.
    value_weight : float
        Weight of what a value writes; see :func:`kvpress_moe.training.losses.target`.
    router_type : {"pikv", "base"}
    bottleneck, learned_width : int
        Widths of the gate and of the learned expert.
    learned_sees : bool
        Whether the learned expert sees the others' ranks beside the hidden state.
    gate : bool
        If False, all experts keep equal weights: a static mixture, for ablations.
    dropout, aux_loss_weight, budget_weight, learning_rate : float
        ``budget_weight`` is the weight of :func:`kvpress_moe.training.losses.budget_loss`; the squared error has
        weight 1.
    epochs, seed : int
        Epochs of the layer-by-layer fit, and the seed of prompts and training.
    end_to_end : int
        Epochs of :class:`kvpress_moe.training.end_to_end.EndToEnd` after the fit; 0: none.
    end_to_end_rate, replay_weight : float
        For that tuning: the highest learning rate, and the weight of repetitions. Answers have weight 1.
    coded_share : float
        Share of the prompts whose budget counts bytes in that tuning; the others evict pairs only. 0: the routers do
        not learn to choose strategies.
    transform_prompts : int
        Number of prompts that key transforms are fitted to, at most all of them; 0: no key transforms.
    long_samples : int
        Number of longer prompts of the tasks, up to three times ``length``. They show how the worth of a pair falls
        with its distance. Scores do not decay with distance if it is 0, without end-to-end tuning, or if the model
        reads less than 2.5 times ``length``.
    """

    experts: tuple[str, ...] = ("learned", "keydiff", "leverage", "cur", "tova")
    top_k: int = 5
    samples: int = 54  # every kind at three lengths
    study: int = 42
    length: int = 1024
    tasks: tuple[str, ...] = tuple(task for task in TASKS if task not in HELD_OUT)
    teacher: str = "both"
    value_weight: float = 0.5
    gate: bool = True
    router_type: str = "pikv"
    bottleneck: int = 16
    learned_width: int = 64
    learned_sees: bool = True
    dropout: float = 0.1
    aux_loss_weight: float = 0.01
    budget_weight: float = 2.0
    epochs: int = 8
    learning_rate: float = 3e-3
    seed: int = 0
    end_to_end: int = 3
    end_to_end_rate: float = 1e-3
    replay_weight: float = 1.0
    coded_share: float = 0.5
    transform_prompts: int = 24
    long_samples: int = 18

    def check(self) -> None:
        """Raise SettingError for the first wrong field, before anything is loaded."""
        for name in self.experts:
            make_expert(name)
        find_tasks(self.tasks)
        if len(set(self.experts)) != len(self.experts):
            raise SettingError("experts", self.experts, "each expert once", "")
        if not 1 <= self.top_k <= len(self.experts):
            raise SettingError("top_k", self.top_k, f"a number from 1 to {len(self.experts)}", "")
        if self.teacher not in TEACHERS:
            raise SettingError("teacher", self.teacher, f"one of {', '.join(TEACHERS)}", "")
        if not 0 <= self.value_weight <= 1:
            raise SettingError("value_weight", self.value_weight, "a number from 0 to 1", "0 is attention alone.")
        for field in ("samples", "epochs", "bottleneck", "learned_width"):
            if getattr(self, field) < 1:
                raise SettingError(field, getattr(self, field), "at least 1", "")
        if not is_whole(self.study):
            raise SettingError("study", self.study, "a number of prompts, 0 or more", "0: only prompts of tasks.")
        if not is_whole(self.end_to_end):
            raise SettingError("end_to_end", self.end_to_end, "a number of epochs, 0 or more", "0 leaves it out.")
        if not is_whole(self.transform_prompts):
            raise SettingError("transform_prompts", self.transform_prompts, "a number of prompts, 0 or more", "")
        if not is_whole(self.long_samples):
            raise SettingError("long_samples", self.long_samples, "a number of prompts, 0 or more", "0: no decays.")
        for field in ("end_to_end_rate", "replay_weight", "aux_loss_weight", "budget_weight", "learning_rate"):
            value = getattr(self, field)
            if not (is_number(value) and value >= 0):
                raise SettingError(field, value, "a finite number, 0 or more", "")
        if not (is_number(self.coded_share) and 0 <= self.coded_share <= 1):
            raise SettingError("coded_share", self.coded_share, "a number from 0 to 1", "0: pairs are evicted only.")
        if self.length < 256:
            raise SettingError("length", self.length, "at least 256 tokens", "")

    @property
    def heuristics(self) -> tuple[str, ...]:
        """The experts whose scores are captured."""
        return tuple(name for name in self.experts if name != "learned")

    @property
    def layer_by_layer(self) -> dict[str, Any]:
        """The fields that determine the layer-by-layer fit."""
        return {name: value for name, value in asdict(self).items() if name not in _END_TO_END}

    def longest(self, limit: int) -> int:
        """Length of the longest prompt for a model that reads ``limit`` tokens; 0 if there are no long prompts."""
        longest = min(LONGEST * self.length, limit - self.length // 2)
        return longest if self.long_samples and self.end_to_end and longest >= 2 * self.length else 0

    def reach(self, limit: int) -> int:
        """Distance from which scores decay, in tokens. 0: they do not decay."""
        return int(REACH * self.length) if self.longest(limit) else 0
