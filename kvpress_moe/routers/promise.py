"""
Promise: how much a prompt has to keep, so that the KL divergence of its answers stays below a bound.

An estimate of the KL divergence is read from what the routers know of the prompt. Split conformal prediction (Vovk et
al., 2005; Lei et al., arXiv 1604.04173) makes a promise of it: on prompts that neither the routers nor the estimate
have seen, it is measured how far above the estimate's answer a bound has to be. A share ``confidence`` of the prompts
that are drawn like these then stays within the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kvpress_moe.budget.confidence import prompts_needed
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.files import is_number, is_text, is_whole
from kvpress_moe.routers.sight import Sight

LEAST = 1e-5  # of a measured KL divergence; smaller ones are noise of float32
FITTED = (1e-4, 1.0)  # KL divergences that the estimate is fitted to
LEAST_POINTS = 20
STEP = 0.02  # of a logarithm in a file, in nats
LEAST_SLOPE = 1e-3
LARGEST = 1e6  # of any number in a file; logarithms, weights and tokens are far smaller
LONGER = 1.25  # times as long as the longest calibration prompt, or as short as the shortest, is not unlike yet
RIDGE = 2.0  # penalty of the features' weights, if each had a variance of one over their number
UNLIKE = 0.95  # share of the calibration prompts that are less far from the centre than an unlike prompt
SHRINK = 0.003  # added to the correlations' diagonal
CAUTION = 4  # for unlike prompts, the share that may exceed the bound is divided by this


class Decision(NamedTuple):
    """
    What a prompt keeps.

    Attributes
    ----------
    share : float
        Share of the bytes in a 16-bit cache. 1: everything, as the model wrote it.
    expected_kl : float
        Estimate of the mean KL divergence with this share, in nats. It is a median: half of the prompts have less.
    is_unlike : bool
        Whether the prompt is unlike those of the calibration. The margin is then that of a higher confidence, and
        nothing is promised.
    is_enough : bool
        Whether the share is as large as the margin demands. Not if ``max_bytes`` forbids it, or if everything would be
        needed but the menu has no whole pairs.
    """

    share: float
    expected_kl: float
    is_unlike: bool
    is_enough: bool


@dataclass(frozen=True)
class Estimate:
    """
    Logarithm of the KL divergence, read from what the routers know of a prompt.

    It is linear in ``log(lost)``, ``-log(share)`` and the features. The first slope is not negative and the second one
    is positive, so that more bytes have a lower estimate.

    Attributes
    ----------
    slopes : Tensor, shape (2,)
    weights, mean : Tensor, shape (F,)
    intercept : float
    spread : Tensor, shape (F,)
        Standard deviation of each feature among the fitted prompts.
    correlation : Tensor, shape (F, F)
        Of the features among the fitted prompts.
    """

    slopes: Tensor
    weights: Tensor
    mean: Tensor
    intercept: float
    spread: Tensor
    correlation: Tensor

    @classmethod
    def fit(cls, features: Tensor, lost: Tensor, divergences: Tensor, shares: Tensor) -> Self:
        """
        Fit to measured KL divergences, by ridge regression.

        Parameters
        ----------
        features : Tensor, shape (N, F)
            See :class:`kvpress_moe.routers.sight.Sight`.
        lost, divergences : Tensor, shape (N, K)
            What N prompts lose at K shares, and the KL divergences that were measured.
        shares : Tensor, shape (K,)

        Raises
        ------
        SettingError
            If there are fewer than two prompts, or fewer than ``LEAST_POINTS`` divergences in the range ``FITTED``.
        """
        mean = features.mean(0)
        centred = features - mean
        curves = _of_curve(lost, shares)  # (N, K, 2)
        logs, fitted = points_to_fit(divergences, "fit")
        inputs = torch.cat((curves, centred[:, None].expand(-1, len(shares), -1)), dim=-1)[fitted]
        scale = features.std(0).clamp(min=1e-6) * len(mean) ** 0.5
        penalty = torch.cat((torch.full((2,), 1e-3).double(), RIDGE * scale**2))
        used = torch.ones(2, dtype=torch.bool)
        while True:
            weights, intercept = _ridge(inputs, logs[fitted], penalty, used)
            if not bool((weights[:2] < 0).any()):
                break
            used &= weights[:2] >= 0
        slopes = _not_flat(weights[:2])
        spread = features.std(0, correction=0).clamp(min=1e-3)
        correlation = (centred / spread).T @ (centred / spread) / len(features)
        return cls(slopes, weights[2:], mean, float(intercept), spread, correlation)

    def adapted(self, features: Tensor, lost: Tensor, divergences: Tensor, shares: Tensor) -> Self:
        """
        The same estimate for prompts of another kind: with new slopes, a new intercept, and smaller weights.

        All weights are multiplied by one factor between 0 and 1. It is small if the features say little of these
        prompts. With so few free numbers, few prompts are enough.

        Parameters
        ----------
        features : Tensor, shape (N, F)
        lost, divergences : Tensor, shape (N, K)
        shares : Tensor, shape (K,)

        Raises
        ------
        SettingError
            As in :meth:`fit`.
        """
        logs, fitted = points_to_fit(divergences, "adapt")
        traits = ((features - self.mean) @ self.weights)[:, None, None].expand(-1, len(shares), 1)
        inputs, wanted = torch.cat((_of_curve(lost, shares), traits), dim=-1)[fitted], logs[fitted]
        found, intercept = _least_squares(inputs, wanted)
        slopes = _not_flat(found[:2])
        return replace(self, slopes=slopes, weights=found[2] * self.weights, intercept=float(intercept))

    def at(self, features: Tensor, lost: Tensor, shares: Tensor) -> Tensor:
        """
        Estimated logarithm of the KL divergence at K shares: (N, K), float64. It never rises with the share.

        Parameters
        ----------
        features : Tensor, shape (N, F)
        lost : Tensor, shape (N, K)
        shares : Tensor, shape (K,)
        """
        of_prompt = (features - self.mean) @ self.weights + self.intercept
        return (_of_curve(lost, shares) @ self.slopes + of_prompt[:, None]).cummin(-1).values


def _of_curve(lost: Tensor, shares: Tensor) -> Tensor:
    """What the estimate reads of prompts at each share: (N, K, 2)."""
    return torch.stack((lost.clamp(min=1e-9).log(), -shares.log().expand_as(lost)), dim=-1)


def points_to_fit(divergences: Tensor, setting: str) -> tuple[Tensor, Tensor]:
    """
    Logarithms of measured KL divergences (N, K), and which of them an estimate is fitted to.

    Raises
    ------
    SettingError
        If there are fewer than two prompts, or fewer than ``LEAST_POINTS`` such divergences.
    """
    logs = divergences.double().clamp(min=LEAST).log()
    fitted = (logs > math.log(FITTED[0])) & (logs < math.log(FITTED[1]))
    if len(divergences) < 2 or int(fitted.sum()) < LEAST_POINTS:
        raise SettingError(
            setting,
            len(divergences),
            f"2 prompts or more, with at least {LEAST_POINTS} KL divergences between {FITTED[0]:g} and {FITTED[1]:g}",
            f"These have {int(fitted.sum())}. Take more prompts, or longer ones.",
        )
    return logs, fitted


def _not_flat(slopes: Tensor) -> Tensor:
    """Slopes of an estimate that falls with the share. A flat one would have no least share."""
    return slopes.clamp(min=slopes.new_tensor([0.0, LEAST_SLOPE]))


def _ridge(inputs: Tensor, wanted: Tensor, penalty: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F,) and intercept of a ridge regression. Of the first inputs only those ``used`` have a weight."""
    kept = torch.cat((used, torch.ones(inputs.shape[1] - len(used), dtype=torch.bool)))
    own, centre = inputs[:, kept], inputs[:, kept].mean(0)
    own = own - centre
    solved = torch.linalg.solve(own.T @ own + torch.diag(penalty[kept]), own.T @ (wanted - wanted.mean()))
    weights = inputs.new_zeros(inputs.shape[1])
    weights[kept] = solved
    return weights, wanted.mean() - centre @ solved


def _least_squares(inputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (3,) that are not negative, the last one at most 1, and the intercept, with the least squared error."""
    penalty = inputs.new_full((3,), 1e-3)
    found: list[tuple[float, int, Tensor, Tensor]] = []
    for free, second_free, last in product((True, False), (True, False), (None, 0.0, 1.0)):  # all faces of the box
        used = torch.tensor([free, second_free, last is None])
        weights, intercept = _ridge(inputs, wanted - (last or 0.0) * inputs[:, 2], penalty, used)
        weights[2] = weights[2] if last is None else last
        if bool((weights >= 0).all()) and weights[2] <= 1:
            error = float((inputs @ weights + intercept - wanted).square().sum())
            found.append((error, len(found), weights, intercept))
    _, _, weights, intercept = min(found)
    return weights, intercept


@dataclass(frozen=True)
class Promise:
    """
    An estimate and its calibration, for one setting of the press.

    Attributes
    ----------
    estimate : Estimate
    shares : Tensor, shape (K,)
        Shares of the bytes (of a 16-bit cache) at which KL divergences were measured, rising.
    estimates, divergences : Tensor, shape (N, K)
        Logarithms of the estimated and of the measured KL divergences of the calibration prompts.
    centre : Tensor, shape (F,)
        Mean of the calibration prompts' features.
    farthest : float
        Distance from the centre that nearly all calibration prompts are within, see :meth:`distances`.
    lengths : tuple of (int, int)
        Smallest and largest number of tokens of a calibration prompt.
    about : dict
        What the calibration belongs to: ``precision``, ``min_share``, ``top_k`` and ``capacity_factor`` of the press;
        ``routers`` (a hash of their weights), ``prompts`` (their source), ``seed``, ``versions``.
    unadapted : Estimate, optional
        The estimate before it was adapted. None: it was not. Another calibration starts from it, because the prompts
        that an estimate was adapted to must not give its margins.
    """

    estimate: Estimate
    shares: Tensor
    estimates: Tensor
    divergences: Tensor
    centre: Tensor
    farthest: float
    lengths: tuple[int, int]
    about: dict[str, Any]
    unadapted: Estimate | None = None

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        features: Tensor,
        lost: Tensor,
        divergences: Tensor,
        shares: Tensor,
        about: dict[str, Any],
        unadapted: Estimate | None = None,
    ) -> Self:
        """
        Calibrate an estimate with measured prompts that it was not fitted to.

        Parameters
        ----------
        estimate : Estimate
        features : Tensor, shape (N, F)
        lost, divergences : Tensor, shape (N, K)
        shares : Tensor, shape (K,)
        about : dict
        unadapted : Estimate, optional
            The estimate before it was adapted.
        """
        logs = divergences.clamp(min=LEAST).log()
        centre = features.mean(0)
        tokens = features[:, 0].exp().round()
        made = cls(
            estimate,
            shares,
            estimate.at(features, lost, shares),
            logs,
            centre,
            0.0,
            (int(tokens.min()), int(tokens.max())),
            about,
            unadapted,
        )
        others = len(features) / max(1, len(features) - 1)  # a prompt itself moves the centre
        return replace(made, farthest=float((others * made.distances(features)).quantile(UNLIKE)))

    def distances(self, features: Tensor) -> Tensor:
        """
        How far prompts' features (N, F) are from the centre: their Mahalanobis distances, (N,).

        The correlations are those of the fitted prompts. So a combination of features that they do not have is far,
        even if each feature alone is usual.
        """
        away = (features - self.centre) / self.estimate.spread
        shrunk = self.estimate.correlation + SHRINK * torch.eye(len(self.centre), dtype=torch.float64)
        distances: Tensor = (away * torch.linalg.solve(shrunk, away.T).T).sum(-1).clamp(min=0).sqrt()
        return distances

    @property
    def n_prompts(self) -> int:
        """Number of calibration prompts."""
        return len(self.divergences)

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest ``max_kl`` that can be promised: the range of the median measured divergence."""
        medians = self.divergences.median(0).values.exp()
        low, high = max(float(medians[-1]), 10 * LEAST), float(medians[0])
        digits = 10.0 ** (1 - math.floor(math.log10(low))), 10.0 ** (1 - math.floor(math.log10(high)))
        return math.ceil(low * digits[0]) / digits[0], math.floor(high * digits[1]) / digits[1]  # two digits, inwards

    def check(self, max_kl: float, confidence: float) -> None:
        """
        Raise unless this can be promised.

        Raises
        ------
        SettingError
            If ``max_kl`` is outside of the calibrated range, or if there were too few prompts for ``confidence``.
        """
        low, high = self.bounds
        if not low <= max_kl <= high:
            raise SettingError(
                "max_kl",
                max_kl,
                f"a bound within the calibrated range, from {low:.2g} to {high:.2g}",
                "Outside of it nothing was measured.",
            )
        needed = prompts_needed(confidence)
        if needed > self.n_prompts:
            raise SettingError(
                "confidence",
                confidence,
                f"at most {self.n_prompts / (self.n_prompts + 1):.4f} with {self.n_prompts} calibration prompts",
                f"It needs {needed} prompts: kvpress-moe calibrate --confidence {confidence:g}.",
            )

    def margins(self, max_kl: float) -> Tensor:
        """
        How far below ``log(max_kl)`` each calibration prompt's estimate had to be, for its divergence to fit: (N,).

        Minus infinity: it fits at the smallest share already. Infinity: at no measured share.
        """
        bound, last = math.log(max_kl), len(self.shares) - 1
        over = self.divergences > bound
        left = (last - over.flip(-1).int().argmax(-1)).clamp(max=last - 1)[:, None]  # the last share that is over
        high, low = self.divergences.gather(1, left), self.divergences.gather(1, left + 1)
        at = (high - bound) / (high - low)  # on a line between both shares
        needed = torch.lerp(self.estimates.gather(1, left), self.estimates.gather(1, left + 1), at)
        found = (bound - needed)[:, 0]
        found[~over.any(-1)] = -torch.inf
        found[over[:, -1]] = torch.inf
        return found

    def margin(self, max_kl: float, confidence: float) -> float:
        """The margin below ``log(max_kl)`` that is large enough for a share ``confidence`` of the prompts."""
        rank = math.ceil((self.n_prompts + 1) * confidence)
        return float(self.margins(max_kl).sort().values[min(rank, self.n_prompts) - 1])

    def are_unlike(self, features: Tensor) -> Tensor:
        """
        Whether prompts, by their features (N, F), are unlike the calibration prompts: (N,), bool.

        They are further from the centre than nearly all calibration prompts, or clearly longer or shorter than all.
        """
        tokens, (shortest, longest) = features[:, 0].exp(), self.lengths
        of_other_length = (tokens < shortest / LONGER) | (tokens > longest * LONGER)
        return (self.distances(features) > self.farthest) | of_other_length

    def curve(self, sight: Sight) -> Tensor:
        """Expected KL divergence of a prompt at the measured shares: (K,), float64."""
        return self._estimates(sight).exp()

    def _estimates(self, sight: Sight) -> Tensor:
        if len(sight.features) != len(self.estimate.mean):
            raise CheckpointError(
                f"router: promises.json is of a model with {len(self.estimate.mean) - 1} compressed KV heads, "
                f"this one has {len(sight.features) - 1}. Calibrate the routers for this model."
            )
        return self.estimate.at(sight.features[None], sight.lost(self.shares)[None], self.shares)[0]

    def decide(
        self,
        sight: Sight,
        max_kl: float,
        confidence: float,
        least: float = 0.0,
        most: float = 1.0,
        has_whole: bool = True,
    ) -> Decision:
        """
        Choose the smallest share of the bytes that keeps the promise.

        Parameters
        ----------
        sight : Sight
        max_kl : float
            In nats.
        confidence : float
        least, most : float
            Hard bounds on the share.
        has_whole : bool
            Whether pairs may stay as the model wrote them. Then nothing is lost at a share of 1.
        """
        estimates = self._estimates(sight)
        is_unlike = bool(self.are_unlike(sight.features[None]))
        margin = self.margin(max_kl, cautious(confidence) if is_unlike else confidence)
        needed = share_at(estimates, self.shares, math.log(max_kl) - margin)
        share = min(max(needed, least), most)
        if share == 1 and has_whole:
            return Decision(1.0, 0.0, is_unlike, True)
        expected = math.exp(min(float(_on_line(estimates, self.shares, share)), math.log(LARGEST)))
        return Decision(share, expected, is_unlike, needed < 1 and share >= needed)

    def as_dict(self) -> dict[str, Any]:
        """
        Plain data for a JSON file.

        Logarithms are whole numbers of ``STEP``: the first of a prompt, then the differences from share to share. So
        they take little space.
        """
        estimate = self.estimate
        return {
            "about": self.about,
            **_line_as_dict(estimate),
            **({} if self.unadapted is None else {"unadapted": _line_as_dict(self.unadapted)}),
            "mean": _significant(estimate.mean),
            "shares": self.shares.tolist(),
            "estimates": _as_steps(self.estimates),
            "divergences": _as_steps(self.divergences),
            "centre": _significant(self.centre, 4),
            "spread": _significant(estimate.spread, 4),
            "correlation": _packed(estimate.correlation),
            "farthest": float(f"{self.farthest:.4g}"),
            "lengths": list(self.lengths),
        }

    @classmethod
    def from_dict(cls, saved: Any, n_features: int) -> Self:
        """
        Build a promise from what :meth:`as_dict` returned. Anybody may have written it.

        Raises
        ------
        ValueError, TypeError, KeyError
            If a field is wrong or missing.
        """
        shares = _tensor(saved, "shares")
        n_prompts = len(saved["divergences"])
        shapes = {
            "mean": (n_features,),
            "centre": (n_features,),
            "spread": (n_features,),
            "correlation": (n_features * (n_features + 1) // 2,),
            "estimates": (n_prompts, len(shares)),
            "divergences": (n_prompts, len(shares)),
        }
        found = {name: _tensor(saved, name) for name in shapes}
        for name in ("estimates", "divergences"):
            found[name] = STEP * found[name].cumsum(-1)
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise ValueError(f"{name}: shape {tuple(found[name].shape)}, expected {shape}")
        if not (n_prompts and len(shares) > 1 and bool((shares.diff() > 0).all()) and shares[0] > 0 and shares[-1] < 1):
            raise ValueError("shares: expected rising numbers between 0 and 1, and at least one prompt")
        if bool((found["spread"] <= 0).any()):
            raise ValueError("spread: expected positive numbers")
        if bool((found["estimates"].diff() > 0).any()):
            raise ValueError("estimates: expected none that rise with the share")
        if not is_number(saved["farthest"]) or abs(saved["farthest"]) > LARGEST:
            raise ValueError("farthest: expected a finite number")
        lengths = saved["lengths"]
        if not (isinstance(lengths, list) and len(lengths) == 2 and all(is_whole(length, 1) for length in lengths)):
            raise ValueError("lengths: expected two numbers of tokens")
        about = saved["about"]
        texts, figures = ("precision", "prompts", "routers"), ("min_share", "capacity_factor")
        if not all(is_text(about[name]) for name in texts) or not all(is_number(about[name]) for name in figures):
            raise ValueError("about: expected precision, prompts, routers, min_share and capacity_factor")
        if not (is_whole(about["top_k"], 1) and is_whole(about["seed"]) and isinstance(about["versions"], dict)):
            raise ValueError("about: expected top_k, seed and versions")
        correlation = _unpacked(found["correlation"], n_features)
        shrunk = correlation + SHRINK * torch.eye(n_features, dtype=torch.float64)
        if int(torch.linalg.cholesky_ex(shrunk).info):
            raise ValueError("correlation: expected a positive definite matrix")
        slopes, weights, intercept = _line_of(saved, n_features)
        estimate = Estimate(slopes, weights, found["mean"], intercept, found["spread"], correlation)
        unadapted = None
        if "unadapted" in saved:
            slopes, weights, intercept = _line_of(saved["unadapted"], n_features)
            unadapted = replace(estimate, slopes=slopes, weights=weights, intercept=intercept)
        kept = (found["estimates"], found["divergences"], found["centre"])
        ends = (lengths[0], lengths[1])
        return cls(estimate, shares, *kept, float(saved["farthest"]), ends, about, unadapted)


def cautious(confidence: float) -> float:
    """The confidence whose margin prompts get that are unlike those of the calibration."""
    return 1 - (1 - confidence) / CAUTION


def share_at(estimates: Tensor, shares: Tensor, bound: float) -> float:
    """The smallest share whose estimate (on lines between those measured) is at most ``bound``; 1 if there is none."""
    if float(estimates[-1]) > bound:
        return 1.0
    if float(estimates[0]) <= bound:
        return float(shares[0])
    right = int((estimates <= bound).nonzero()[0])
    high, low = estimates[right - 1], estimates[right]
    at = float((high - bound) / (high - low))
    return float(torch.lerp(shares[right - 1].log(), shares[right].log(), at).exp())


def _on_line(estimates: Tensor, shares: Tensor, share: float) -> Tensor:
    """The estimate at a share, on the line between those measured; beyond the ends on the nearest line."""
    logs, wanted = shares.log(), math.log(share)
    right = min(max(int(torch.searchsorted(logs, wanted)), 1), len(shares) - 1)
    at = float((wanted - logs[right - 1]) / (logs[right] - logs[right - 1]))
    return torch.lerp(estimates[right - 1], estimates[right], at)


def _as_steps(logs: Tensor) -> list[list[int]]:
    """Logarithms (N, K) as whole numbers: the first of each row, then differences."""
    steps = (logs / STEP).round().long()
    rows: list[list[int]] = torch.cat((steps[:, :1], steps.diff(dim=-1)), dim=-1).tolist()
    return rows


def _packed(matrix: Tensor) -> list[int]:
    """The lower triangle of a matrix of correlations, as whole numbers of a ten-thousandth."""
    rows, columns = torch.tril_indices(len(matrix), len(matrix))
    numbers: list[int] = (matrix[rows, columns] * 1e4).round().long().tolist()
    return numbers


def _unpacked(triangle: Tensor, size: int) -> Tensor:
    rows, columns = torch.tril_indices(size, size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix[rows, columns] = matrix[columns, rows] = triangle / 1e4
    return matrix


def _line_as_dict(estimate: Estimate) -> dict[str, Any]:
    """What adapting an estimate changes."""
    return {
        "slopes": _significant(estimate.slopes, 4),
        "weights": _significant(estimate.weights),
        "intercept": float(f"{estimate.intercept:.4g}"),
    }


def _line_of(saved: Any, n_features: int) -> tuple[Tensor, Tensor, float]:
    """Slopes, weights and intercept."""
    slopes, weights, intercept = _tensor(saved, "slopes"), _tensor(saved, "weights"), saved["intercept"]
    if slopes.shape != (2,) or weights.shape != (n_features,):
        raise ValueError(f"slopes, weights: expected 2 and {n_features} numbers")
    if bool((slopes < 0).any()) or float(slopes[1]) < 0.9 * LEAST_SLOPE:
        raise ValueError("slopes: expected a first one that is not negative and a positive second one")
    if not is_number(intercept) or abs(intercept) > LARGEST:
        raise ValueError("intercept: expected a finite number")
    return slopes, weights, float(intercept)


def _significant(tensor: Tensor, digits: int = 3) -> list[float]:
    return [float(f"{x:.{digits}g}") for x in tensor.tolist()]


def _tensor(saved: Any, name: str) -> Tensor:
    rows = saved[name]
    flat = [x for row in rows for x in (row if isinstance(row, list) else [row])]
    if not flat or not all(is_number(x) and abs(x) <= LARGEST for x in flat):
        raise ValueError(f"{name}: expected numbers of ordinary size")
    return torch.tensor(rows, dtype=torch.float64)
