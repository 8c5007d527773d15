"""Ray backend: evaluate samples on a Ray cluster, one model per worker. Records come in the order they finish."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from kvpress_moe.benchmark.evaluator import Evaluator
from kvpress_moe.benchmark.plan import Cell, Plan
from kvpress_moe.benchmark.tasks import Sample
from kvpress_moe.errors import SettingError

Work = list[tuple[Sample, list[Cell]]]


def over_ray(address: str, retries: int = 3) -> Callable[[Plan, Work], Iterator[dict[str, Any]]]:
    """
    A function that evaluates a plan's work on a Ray cluster.

    Parameters
    ----------
    address : str
        Address of the cluster. ``"auto"``: the cluster of this machine; ``"local"``: a cluster that is started here.
    retries : int, default=3
        How often a sample is given to another worker after its worker died.

    Returns
    -------
    callable
        ``(plan, work) -> records``, for :func:`kvpress_moe.benchmark.runner.run`. Records are the same as those that
        this machine would write, except for times.

    Raises
    ------
    SettingError
        If Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise SettingError("ray", address, "the package ray", "pip install kvpress-moe[ray]") from error

    def spread(plan: Plan, work: Work) -> Iterator[dict[str, Any]]:
        started = not ray.is_initialized()
        if started:
            connect(ray, address)
        try:
            yield from evaluate(ray, plan, work, retries)
        finally:
            if started:
                ray.shutdown()

    return spread


def connect(ray: Any, address: str) -> None:
    """Join or start a cluster."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
    try:
        if address == "local":
            ray.init(**settings)
        else:
            ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises many kinds
        raise SettingError(
            "ray", address, "the address of a running cluster, auto, or local", f"{type(error).__name__}: {error}"
        ) from error


def evaluate(ray: Any, plan: Plan, work: Work, retries: int) -> Iterator[dict[str, Any]]:
    """Keep every worker busy with one sample at a time; give the samples of a dead worker to a new one."""
    on_gpu = plan.device.startswith("cuda")
    resources = ray.cluster_resources()
    per_worker = 1 if on_gpu else max(1, (os.cpu_count() or 1) // 2)
    n_workers = max(1, int(resources.get("GPU" if on_gpu else "CPU", 1) // per_worker))
    options = {"num_gpus": 1} if on_gpu else {"num_cpus": per_worker}
    actor = ray.remote(Worker).options(**options)
    plan = replace(plan, device="cuda" if on_gpu else plan.device)
    waiting = [(item, 0) for item in reversed(work)]
    running: dict[Any, tuple[Any, tuple[Any, ...], int]] = {}

    def start(worker: Any) -> None:
        item, attempt = waiting.pop()
        running[worker.evaluate.remote(*item)] = (worker, item, attempt)

    for _ in range(min(n_workers, len(work))):
        start(actor.remote(plan, per_worker))
    while running:
        finished, _ = ray.wait(list(running), num_returns=1)
        worker, item, attempt = running.pop(finished[0])
        try:
            record = ray.get(finished[0])
        except ray.exceptions.RayActorError:
            if attempt >= retries:
                raise
            waiting.append((item, attempt + 1))
            worker = actor.remote(plan, per_worker)
        else:
            yield record
        if waiting:
            start(worker)


class Worker:
    """
    An evaluator on a worker's machine.

    Parameters
    ----------
    plan : Plan
    threads : int
        Number of torch's threads.
    """

    def __init__(self, plan: Plan, threads: int):
        import torch

        torch.set_num_threads(threads)
        self.evaluator = Evaluator(plan)

    def evaluate(self, sample: Sample, cells: list[Cell]) -> dict[str, Any]:
        return self.evaluator.evaluate(sample, cells)
