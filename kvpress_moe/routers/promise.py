"""
Promise: how much a prompt has to keep, so that the KL divergence of its answers stays below a bound.

An estimate of the KL divergence is read from what the routers know of the prompt. Split conformal prediction (Vovk et
al., 2005; Lei et al., arXiv 1604.04173) makes a promise of it: on prompts that neither the routers nor the estimate
have seen, it is measured how far above the estimate's answer a bound has to be. A share ``confidence`` of the prompts
that are drawn like these then stays within the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from kvpress_moe.budget.confidence import prompts_needed
from kvpress_moe.errors import CheckpointError, SettingError
from kvpress_moe.files import is_number, is_text, is_whole
from kvpress_moe.routers.sight import Sight

LEAST = 1e-5  # of a measured KL divergence; smaller ones are noise of float32
FITTED = (1e-4, 1.0)  # KL divergences that the estimate is fitted to
RIDGE = 2.0  # penalty of the features' weights, if each had a variance of one over their number
UNLIKE = 0.98  # share of the calibration prompts that are less far from the others than an unlike prompt


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
        Whether the prompt is unlike those of the calibration. The margin is then the largest one.
    is_kept : bool
        Whether the promise holds. Not if a bound on the bytes forbids it.
    """

    share: float
    expected_kl: float
    is_unlike: bool
    is_kept: bool


@dataclass(frozen=True)
class Estimate:
    """
    Logarithm of the KL divergence, read from what the routers know of a prompt.

    It is linear in ``log(lost)``, ``-log(share)`` and the features. The first two slopes are not negative, so that more
    bytes never have a higher estimate.

    Attributes
    ----------
    slopes : Tensor, shape (2,)
    weights, mean : Tensor, shape (F,)
    intercept : float
    spread : Tensor, shape (F,)
        Standard deviation of each feature among the prompts that were fitted.
    """

    slopes: Tensor
    weights: Tensor
    mean: Tensor
    intercept: float
    spread: Tensor

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
        ValueError
            If there are fewer than two prompts.
        """
        if len(features) < 2:
            raise ValueError(f"features: got {len(features)} prompts, expected at least 2.")
        mean = features.mean(0)
        centred = features - mean
        curves = _of_curve(lost, shares)  # (N, K, 2)
        logs = divergences.double().clamp(min=LEAST).log()
        fitted = (logs > math.log(FITTED[0])) & (logs < math.log(FITTED[1]))
        inputs = torch.cat((curves, centred[:, None].expand(-1, len(shares), -1)), dim=-1)[fitted]
        scale = features.std(0).clamp(min=1e-6) * len(mean) ** 0.5
        penalty = torch.cat((torch.full((2,), 1e-3).double(), RIDGE * scale**2))
        used = torch.ones(2, dtype=torch.bool)
        while True:
            weights, intercept = _ridge(inputs, logs[fitted], penalty, used)
            if not bool((weights[:2] < 0).any()):
                break
            used &= weights[:2] >= 0
        return cls(weights[:2], weights[2:], mean, float(intercept), features.std(0).clamp(min=1e-3))

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

    def distances(self, features: Tensor) -> Tensor:
        """How far prompts' features (N, F) are from those of the fitted prompts, in standard deviations: (N,)."""
        return ((features - self.mean) / self.spread).square().mean(-1).sqrt()


def _of_curve(lost: Tensor, shares: Tensor) -> Tensor:
    """What the estimate reads of prompts at each share: (N, K, 2)."""
    return torch.stack((lost.clamp(min=1e-9).log(), -shares.log().expand_as(lost)), dim=-1)


def _ridge(inputs: Tensor, wanted: Tensor, penalty: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (F,) and intercept of a ridge regression. Of the first inputs only those ``used`` have a weight."""
    kept = torch.cat((used, torch.ones(inputs.shape[1] - len(used), dtype=torch.bool)))
    own, centre = inputs[:, kept], inputs[:, kept].mean(0)
    own = own - centre
    solved = torch.linalg.solve(own.T @ own + torch.diag(penalty[kept]), own.T @ (wanted - wanted.mean()))
    weights = inputs.new_zeros(inputs.shape[1])
    weights[kept] = solved
    return weights, wanted.mean() - centre @ solved


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
    distances : Tensor, shape (N,)
        See :meth:`Estimate.distance`.
    about : dict
        What the calibration belongs to: ``precision``, ``min_share``, ``top_k`` and ``capacity_factor`` of the press;
        ``prompts`` (their source), ``seed``, ``versions``.
    """

    estimate: Estimate
    shares: Tensor
    estimates: Tensor
    divergences: Tensor
    distances: Tensor
    about: dict[str, Any]

    @property
    def n_prompts(self) -> int:
        """Number of calibration prompts."""
        return len(self.divergences)

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest ``max_kl`` that can be promised: the range of the median measured divergence."""
        medians = self.divergences.median(0).values.exp()
        return float(medians[-1].clamp(min=10 * LEAST)), float(medians[0])

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
                f"It needs {needed} prompts: kvpress-moe calibrate --prompts {needed}.",
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

    def is_unlike(self, sight: Sight) -> bool:
        """Whether a prompt is further from the fitted ones than nearly all calibration prompts."""
        return float(self.estimate.distances(sight.features[None])) > float(self.distances.quantile(UNLIKE))

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

    def decide(self, sight: Sight, max_kl: float, confidence: float, least: float = 0.0, most: float = 1.0) -> Decision:
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
        """
        estimates = self._estimates(sight)
        is_unlike = self.is_unlike(sight)
        margin = float(self.margins(max_kl).max()) if is_unlike else self.margin(max_kl, confidence)
        needed = share_at(estimates, self.shares, math.log(max_kl) - margin)
        share = min(max(needed, least), most)
        expected = 0.0 if share == 1 else math.exp(float(_interpolated(estimates, self.shares, share)))
        return Decision(share, expected, is_unlike, share >= needed)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""

        def plain(tensor: Tensor, digits: int) -> Any:
            return [[round(x, digits) for x in row] for row in tensor.tolist()]

        estimate = self.estimate
        return {
            "about": self.about,
            "slopes": _significant(estimate.slopes),
            "weights": _significant(estimate.weights),
            "mean": _significant(estimate.mean),
            "intercept": _significant(torch.tensor([estimate.intercept]).double())[0],
            "spread": _significant(estimate.spread),
            "shares": self.shares.tolist(),
            "estimates": plain(self.estimates, 2),
            "divergences": plain(self.divergences, 2),
            "distances": _significant(self.distances),
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
            "slopes": (2,),
            "weights": (n_features,),
            "mean": (n_features,),
            "spread": (n_features,),
            "estimates": (n_prompts, len(shares)),
            "divergences": (n_prompts, len(shares)),
            "distances": (n_prompts,),
        }
        found = {name: _tensor(saved, name) for name in shapes}
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise ValueError(f"{name}: shape {tuple(found[name].shape)}, expected {shape}")
        if not (n_prompts and len(shares) > 1 and bool((shares.diff() > 0).all()) and shares[0] > 0 and shares[-1] < 1):
            raise ValueError("shares: expected rising numbers between 0 and 1, and at least one prompt")
        if bool((found["spread"] <= 0).any()):
            raise ValueError("spread: expected positive numbers")
        if bool((found["slopes"] < 0).any()) or not is_number(saved["intercept"]):
            raise ValueError("slopes: expected no negative ones, and an intercept")
        about = saved["about"]
        texts, numbers = ("precision", "prompts"), ("min_share", "capacity_factor")
        if not all(is_text(about[name]) for name in texts) or not all(is_number(about[name]) for name in numbers):
            raise ValueError("about: expected precision, prompts, min_share and capacity_factor")
        if not (is_whole(about["top_k"], 1) and is_whole(about["seed"]) and isinstance(about["versions"], dict)):
            raise ValueError("about: expected top_k, seed and versions")
        estimate = Estimate(
            found["slopes"], found["weights"], found["mean"], float(saved["intercept"]), found["spread"]
        )
        return cls(estimate, shares, found["estimates"], found["divergences"], found["distances"], about)


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


def _interpolated(estimates: Tensor, shares: Tensor, share: float) -> Tensor:
    """The estimate at a share, on a line between those measured; beyond the ends that of the nearest."""
    logs, wanted = shares.log(), math.log(share)
    right = min(max(int(torch.searchsorted(logs, wanted)), 1), len(shares) - 1)
    at = float((wanted - logs[right - 1]) / (logs[right] - logs[right - 1]))
    return torch.lerp(estimates[right - 1], estimates[right], min(max(at, 0.0), 1.0))


def _significant(tensor: Tensor) -> list[float]:
    return [float(f"{x:.4g}") for x in tensor.tolist()]


def _tensor(saved: Any, name: str) -> Tensor:
    rows = saved[name]
    flat = [x for row in rows for x in (row if isinstance(row, list) else [row])]
    if not flat or not all(is_number(x) for x in flat):
        raise ValueError(f"{name}: expected finite numbers")
    return torch.tensor(rows, dtype=torch.float64)
