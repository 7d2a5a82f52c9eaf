"""`configs/gpu_8x.toml` is placed on eight declared GPUs: placement without any real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, os, sys
from pathlib import Path
import ray
from cluster.spawn import Role, spawn
from rlhf.config import RLConfig, load_config

class Seat:
    def __init__(self, **arguments): self.arguments = arguments
    def gpus(self): return ray.get_gpu_ids(), ray.get_runtime_context().get_actor_name()

config = load_config(RLConfig, Path("configs/gpu_8x.toml"))
ray.init(address="local", num_gpus=8, num_cpus=16, namespace="placement", include_dashboard=False,
         log_to_driver=False)
roles = [Role(name, Seat, getattr(config.cluster, name), lambda n: {"number": n})
         for name in ("rollout", "reward", "reference", "learner")]
handles = spawn(roles, "threads", timeout_s=120, say=print)
seats = [ray.get(handle.gpus.remote()) for actors in handles.values() for handle in actors]
print(json.dumps({name: gpus for gpus, name in seats}))
"""


def test_eight_gpus_are_shared_out_as_the_config_says() -> None:
    pytest.importorskip("ray")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    seats = json.loads(done.stdout.strip().splitlines()[-1])
    assert sorted(seats) == [
        "learner-0",
        "learner-1",
        "reference-0",
        "reward-0",
        *(f"rollout-{number}" for number in range(4)),
    ]
    whole = [seats[name][0] for name in seats if name.startswith(("rollout", "learner"))]
    assert len(set(whole)) == 6
    assert seats["reward-0"] == seats["reference-0"] or not (
        {*seats["reward-0"], *seats["reference-0"]} & {*whole}
    )
