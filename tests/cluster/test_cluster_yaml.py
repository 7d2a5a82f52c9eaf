"""`ray_cluster.yaml` is one that Ray's cluster launcher takes, and keeps its promises."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILE = ROOT / "ray_cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def started_with(commands: list[str]) -> str:
    """The one command that starts Ray."""
    (start,) = [command for command in commands if "ray start" in command]
    return start


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="ray is not installed")
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

    util.validate_config(util.prepare_config(cluster))

    with pytest.raises(jsonschema.ValidationError):  # the check is a real one
        util.validate_config(util.prepare_config({**cluster, "worker_groups": []}))


def test_every_node_installs_the_project_from_the_lock_file(cluster: dict[str, Any]) -> None:
    lock, project = cluster["setup_commands"]

    assert cluster["file_mounts"]["~/pavlov"] == "."
    assert "--no-deps" in lock
    assert lock.endswith("-r ~/pavlov/requirements/gpu.txt")
    assert (ROOT / "requirements" / "gpu.txt").is_file()
    assert "--no-deps" in project
    assert project.endswith(" ~/pavlov")
    # nothing that runs later on a node changes what the lock file put there
    per_node = [kind.get("worker_setup_commands", []) for kind in node_types(cluster)]
    assert not any([cluster["head_setup_commands"], cluster["worker_setup_commands"], *per_node])


def test_the_image_runs_the_locked_ray(cluster: dict[str, Any]) -> None:
    pins = (ROOT / "requirements" / "gpu.txt").read_text().splitlines()
    (version,) = [pin.removeprefix("ray==") for pin in pins if pin.startswith("ray==")]

    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{version}-py311")


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_processes_of_a_dead_actor_are_cleaned_up(cluster: dict[str, Any], commands: str) -> None:
    before, _, _ = started_with(cluster[commands]).partition("ray start")

    assert "RAY_process_group_cleanup_enabled=1" in before.split(";")[-1].split()


def test_the_cluster_asks_for_a_token(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "RAY_AUTH_MODE=token" in started_with(cluster[commands])


def test_the_head_takes_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]

    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["node_config"]["InstanceType"].startswith("m")  # AWS: general purpose, no GPU


def test_there_are_gpu_workers_for_both_roles_and_cpu_workers(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]

    assert types["rollout"]["resources"]["GPU"] > 0
    assert types["learner"]["resources"]["GPU"] > 0
    assert types["cpu"]["resources"]["GPU"] == 0
    assert types["cpu"]["resources"]["CPU"] > 0


def node_types(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return list(cluster["available_node_types"].values())
