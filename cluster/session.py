"""Joining Ray: a cluster of one's own on a laptop, the given one inside a job."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from cluster.files import in_ray_job
from cluster.guard import Guard
from rlhf.errors import ResourceError


def _watch_raylet(ended: threading.Event) -> None:
    """Ends this process as SIGTERM does when the raylet it started is gone.

    Ray would wait for a node that never comes back, to start the lost actors again.
    """
    import psutil

    raylets = [p for p in psutil.Process().children() if p.name() == "raylet"]
    while raylets and not ended.wait(1.0):
        if not all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in raylets):
            print(
                "pavlov: Ray on this machine died; start again, a run with --resume",
                file=sys.stderr,
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return


def node_address() -> str:
    """This node's address as the other nodes of the cluster know it."""
    import ray

    return str(ray.util.get_node_ip_address())


def free_port() -> int:
    """A port that the system hands out."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def shared_memory_folder(run_id: str) -> Path:
    """Where the weights of a run pass from process to process on one node."""
    return Path("/dev/shm") / f"pavlov-{run_id}"


def hold_shared_memory(folder: Path) -> Any:
    """Make a folder in shared memory and mark it as used by this process, for as long as it lives.

    Keep what is returned: the mark goes with it.
    """
    from filelock import FileLock

    with _sweeping():
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "alive.lock")
        lock.acquire(timeout=10)
    return lock


def sweep_shared_memory() -> None:
    """Remove shared-memory folders that no living process on this node holds.

    Guards leave none behind; this is for those whose guard was killed too.
    """
    with _sweeping():
        for folder in Path("/dev/shm").glob("pavlov-*"):
            if not _is_held(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _sweeping() -> Any:
    """Held while folders are made or swept, so that none is swept before it is marked."""
    from filelock import FileLock

    name = f"pavlov-sweep-{os.getuid()}.lock"
    return FileLock(Path(tempfile.gettempdir()) / name, timeout=60)


def _is_held(folder: Path) -> bool:
    from filelock import FileLock, Timeout

    mark = folder / "alive.lock"
    if not mark.exists():
        return False
    lock = FileLock(mark)
    try:
        lock.acquire(timeout=0)
    except (Timeout, PermissionError):  # held, or another user's
        return True
    lock.release()
    return False


def cluster_address() -> str | None:
    """The cluster that a session of this process joins, None where it starts one of its own."""
    return os.environ.get("RAY_ADDRESS") or ("auto" if in_ray_job() else None)


@contextlib.contextmanager
def ray_session(run_name: str, *, num_cpus: int | None = None) -> Iterator[str]:
    """Connect to Ray and leave it in the end; yields the run's namespace ``<run>-<attempt>``.

    Inside a submitted job, or with RAY_ADDRESS set, it joins that cluster. Otherwise it starts one
    on this machine, with the dashboard, that ends with this process. The working directory is
    never passed again inside a job: the job's own copy of the code is what every actor sees.
    """
    # Read where the raylet starts: it then kills the whole process group of a worker that died.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "true")
    # No usage reports, and no warning about accelerators that are not there.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A thread that still waits for actors when the session has ended must not start another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    import ray

    namespace = f"{run_name}-{uuid4().hex[:6]}"
    address = cluster_address() or "local"
    guard = None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    if address == "local":
        sweep_shared_memory()
        guard = Guard()
    try:
        ray.init(
            address=address,
            namespace=namespace,
            num_cpus=num_cpus if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"Ray at {address!r} cannot be joined: {str(error).splitlines()[0]}"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # Ray puts a handler of its own in the place of ours.
        signal.signal(signal.SIGTERM, on_sigterm)
    ended = threading.Event()
    if guard is not None:
        guard.watch()
        watch = threading.Thread(target=_watch_raylet, args=(ended,), daemon=True)
        watch.start()
    try:
        yield namespace
    finally:
        ended.set()
        ray.shutdown()
        if guard is not None:
            time.sleep(0.2)
            guard.close()
