"""The messages of an NCCL update, through vLLM's own trainer engine; only NCCL is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json
import ray
import torch
from vllm.distributed.weight_transfer import nccl_engine
from cluster.weights.nccl import NcclSender

broadcast = []
# The two places where vLLM's trainer touches NCCL.
nccl_engine.open_trainer_endpoint = lambda init_info: "the group"
nccl_engine.packed_nccl_broadcast_producer = lambda iterator, group, **_: broadcast.append(
    [(name, tensor.sum().item()) for name, tensor in iterator])

class Engine:
    def __init__(self):
        self.calls = []
    def init_weight_transfer(self, info):
        self.calls.append(["init", info["rank_offset"], info["world_size"], info["packed"]])
    def start_weight_transfer(self):
        self.calls.append(["start"])
    def receive_weight_transfer(self, info):
        self.calls.append(["receive", info["names"], info["dtype_names"], info["shapes"]])
    def finish_weight_transfer(self):
        self.calls.append(["finish"])
    def said(self):
        return self.calls

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
engines = [ray.remote(Engine).options(num_cpus=0.1).remote() for _ in range(3)]
sender = NcclSender()
sender.connect(engines, 2)
manifests = []
for version in (1, 2):
    tensors = [("a", torch.full((2, 3), float(version))), ("b", torch.ones(5).bfloat16())]
    manifest = sender.prepare(version, iter(tensors))
    manifests.append([manifest.version, manifest.transport, len(manifest.entries)])
    sender.transmit()
print(json.dumps([ray.get([engine.said.remote() for engine in engines]), broadcast, manifests]))
"""


def test_every_engine_gets_its_ranks_and_every_update_is_begun_fed_and_finished() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said, broadcast, manifests = json.loads(done.stdout.strip().splitlines()[-1])
    # Three engines of two ranks each, and the learner as rank 0.
    update = [
        ["start"],
        ["receive", ["a", "b"], ["float32", "bfloat16"], [[2, 3], [5]]],
        ["finish"],
    ]
    for number, calls in enumerate(said):
        assert calls == [["init", 1 + 2 * number, 7, True], *update, *update]
    assert broadcast == [[["a", 6.0], ["b", 5.0]], [["a", 12.0], ["b", 5.0]]]
    assert manifests == [[1, "nccl", 0], [2, "nccl", 0]]
