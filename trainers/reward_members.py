"""Members with layers of their own: each trained by Ray Train, as many at once as fit.

A member is one `TorchTrainer` run. Ray Train asks for its workers' resources as one placement
group, so members wait for each other where the cluster is small and train side by side where it is
not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.reward_member import MemberJob, TrainedMember, train_member
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session
from rlhf.errors import ResourceError, RunError

_ROUNDING = 1e-6
_RESTARTS = 2
"""Times that a member begins anew when a worker is lost."""


def train_members(jobs: Sequence[MemberJob], console: Console) -> list[TrainedMember]:
    """Train all members; returns them in the order of their jobs.

    Raises:
        ResourceError: the cluster can never give what one member's workers want.
        RunError: a member could not be trained.
    """
    import ray

    trained: dict[int, TrainedMember] = {}
    with ray_session("reward", num_cpus=usable_cores()):
        nodes = [each["Resources"] for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]
        for job in jobs:
            require_resources(job, nodes)
        threads = ThreadPoolExecutor(len(jobs))
        places = {threads.submit(_fit, job): place for place, job in enumerate(jobs)}
        try:
            with Progressing(console, "members", len(jobs)) as progress:
                for done in as_completed(places):
                    trained[places[done]] = done.result()
                    progress.advance(1)
        finally:
            # Those that still train end with the session.
            threads.shutdown(wait=False, cancel_futures=True)
    return [trained[place] for place in range(len(jobs))]


def require_resources(job: MemberJob, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse workers that can never all be placed; `nodes` are the resources of each."""
    settings, each = job.settings, _resources(job)
    room = sum(
        min(int(node.get(name, 0.0) / wanted + _ROUNDING) for name, wanted in each.items())
        for node in nodes
    )
    if room < settings.workers:
        wanted = " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
        raise ResourceError(
            f"a member of kind {settings.kind} wants {settings.workers} workers with {wanted} "
            f"each, and the cluster has room for {room}"
        )


def _fit(job: MemberJob) -> TrainedMember:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    settings = job.settings
    # What Ray Train writes of its own: nothing that anybody needs afterwards.
    storage = Path(job.out) / ".ray-train"
    # The annotations are those of Ray Train's first version, which returned nothing.
    loop: Any = train_member
    trainer = TorchTrainer(
        loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=_resources(job),
        ),
        run_config=RunConfig(
            name=f"member-{job.member}",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=_RESTARTS),
        ),
    )
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunError(
            f"member {job.member} of kind {settings.kind} could not be trained: {reason}"
        ) from None
    shutil.rmtree(storage / f"member-{job.member}", ignore_errors=True)
    trained: TrainedMember = result.return_value
    return trained


def _resources(job: MemberJob) -> dict[str, float]:
    settings = job.settings
    resources = {"CPU": settings.cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    return resources
