"""Weights between two nodes, each a raylet with an object store of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
import ray
import torch
from ray.cluster_utils import Cluster
from cluster.weights import make_sender
from cluster.weights.base import fetch, verified
from cluster.weights.shared_memory import read_tensors
from rlhf.errors import WeightUpdateError

folder = Path(sys.argv[1])

class Sender:
    def __init__(self):
        self.sender = make_sender("object_store", folder / "sender")
    def send(self, version):
        generator = torch.Generator().manual_seed(version)
        # Large enough for the object store: small values travel inside the call.
        tensors = {"w": torch.randn(600, 500, generator=generator),
                   "b": torch.randn(7, generator=generator).bfloat16()}
        self.sent = {name: tensor.float().sum().item() for name, tensor in tensors.items()}
        return self.sender.prepare(version, tensors.items())
    def sums(self):
        return self.sent
    def close(self):
        self.sender.close()
    def node(self):
        return ray.get_runtime_context().get_node_id()

class Receiver(Sender):
    def __init__(self):
        pass
    def receive(self, manifest):
        path = fetch(manifest, folder / "receiver")
        got = dict(verified(read_tensors(path), manifest.entries))
        left = sorted(p.name for p in path.parent.iterdir())
        return {name: tensor.float().sum().item() for name, tensor in got.items()}, left

cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "resources": {"one": 1}, "include_dashboard": False})
cluster.add_node(num_cpus=1, resources={"two": 1})
ray.init(address=cluster.address, log_to_driver=False)
try:
    sender = ray.remote(Sender).options(resources={"one": 1}).remote()
    receiver = ray.remote(Receiver).options(resources={"two": 1}).remote()
    nodes = ray.get([sender.node.remote(), receiver.node.remote()])
    rounds = []
    for version in (1, 2):
        manifest = ray.get(sender.send.remote(version))
        got, left = ray.get(receiver.receive.remote(manifest))
        rounds.append((got == ray.get(sender.sums.remote()), left))
    print(json.dumps({"nodes": len(set(nodes)), "rounds": rounds}))
finally:
    ray.shutdown()
    cluster.shutdown()
"""


def test_the_object_store_brings_weights_to_another_node(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["nodes"] == 2
    assert found["rounds"] == [
        [True, ["version-1.safetensors"]],
        [True, ["version-2.safetensors"]],
    ]
