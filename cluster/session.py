"""Joining Ray: a cluster of one's own on a laptop, the given one inside a job."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from cluster.files import in_ray_job
from cluster.guard import Guard
from rlhf.errors import ResourceError


def shared_memory_folder(run_id: str) -> Path:
    """Where the weights of a run pass from process to process on one node."""
    return Path("/dev/shm") / f"pavlov-{run_id}"


def sweep_shared_memory() -> None:
    """Remove shared-memory folders whose runs are gone from this node (no lock is held)."""
    from filelock import FileLock, Timeout

    for folder in Path("/dev/shm").glob("pavlov-*"):
        lock = FileLock(folder / "alive.lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):
            (folder / "alive.lock").unlink(missing_ok=True)
            folder.rmdir()


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
    import ray

    namespace = f"{run_name}-{uuid4().hex[:6]}"
    address = os.environ.get("RAY_ADDRESS") or ("auto" if in_ray_job() else "local")
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
    if guard is not None:
        guard.watch()
    try:
        yield namespace
    finally:
        ray.shutdown()
        if guard is not None:
            time.sleep(0.2)
            guard.close()
