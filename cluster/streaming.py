"""A stream of tables through actors by Ray Data: any length, a bounded part of it in memory.

::

    read() in one task ──blocks──► map_batches: a pool of actors ──blocks, in order──► the driver

Whoever is ahead waits for the one behind. An actor that dies is started again, and its batch with
it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.layout import actor_environment
from cluster.spawn import find_cause, first_line
from rlhf.errors import ActorLostError, PavlovError, ResourceError, RunError

_BLOCK_BYTES = 256 * 1024
"""A block as it is read: about two hundred pairs."""
_BATCH_ROWS = 256
_SHARE = 0.6
"""Of a node's CPUs for its actor: more than half, so that no two stand on one node."""
_SAY_EVERY_S = 30.0
_NO_PROGRESS_S = 3600.0
"""Without any block read or computed. A batch may take long: a large model on CPU."""


@dataclass(frozen=True, slots=True)
class Pool:
    """How many actors compute, and what each takes."""

    actors: int
    cpus: float
    gpus: float


def choose_pool(nodes: Sequence[Mapping[str, float]], *, use_gpus: bool) -> Pool:
    """An actor for every GPU, else one for every node: it computes with all cores.

    `nodes` are the resources of each. The reader takes no CPU of Ray's: with one core it must run
    beside an actor, and it waits for most of the time.

    Raises:
        ResourceError: there is neither.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes) if use_gpus else 0
    if gpus:
        return Pool(gpus, 0, 1)
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    if not cpus:
        raise ResourceError("no node of the cluster has a CPU to compute with")
    return Pool(len(cpus), _SHARE * min(cpus), 0)


def stream_through_actors(
    read: Callable[[], Iterator[pa.Table]],
    cls: type,
    arguments: Mapping[str, Any],
    *,
    use_gpus: bool,
    say: Callable[[str], None] = lambda text: None,
) -> Generator[pa.Table, None, None]:
    """What ``cls(**arguments, gpus=…)(table)`` gives of everything that `read` gives, in order.

    Inside a `ray_session`. `read` runs on this node, as files of the driver's are there. Until the
    first table comes `say` is told, every half minute, what is waited for.

    Raises:
        PavlovError: as `read` or an actor raised it.
        ResourceError: there is nothing to compute with.
        ActorLostError: an actor died again and again.
        RunError: anything else.
    """
    import ray

    try:
        yield from _stream(read, cls, arguments, use_gpus, say)
        return
    except ray.exceptions.RayError as error:
        failure = _own_error(error)
    # Not from Ray's error: that holds the actors, and with them their resources, for as long as
    # somebody holds it.
    raise failure


def _stream(
    read: Callable[[], Iterator[pa.Table]],
    cls: type,
    arguments: Mapping[str, Any],
    use_gpus: bool,
    say: Callable[[str], None],
) -> Iterator[pa.Table]:
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    pool = choose_pool(
        [node["Resources"] for node in ray.nodes() if node["Alive"]], use_gpus=use_gpus
    )
    environment = {"env_vars": actor_environment("turns", pool.gpus)}
    dataset = ray.data.read_datasource(
        _one_task(read), override_num_blocks=1, num_cpus=0, runtime_env=environment
    ).map_batches(
        cls,
        fn_constructor_kwargs={**arguments, "gpus": pool.gpus},
        batch_size=_BATCH_ROWS,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=pool.actors),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        runtime_env=environment,
    )
    context = dataset.context
    context.target_max_block_size = _BLOCK_BYTES
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    try:
        with _without_complaint(context), _saying(pool, say) as first_came:
            for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
                first_came.set()
                yield table
    except ray.data.exceptions.ExecutionTimeoutError as error:
        raise RunError(f"the stream stands still: {first_line(error)}") from None


@contextlib.contextmanager
def _saying(pool: Pool, say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Say what is waited for until the event is set: an actor may load a large model, or others
    may hold what it wants."""
    import ray

    first_came, started = threading.Event(), time.monotonic()

    def wait() -> None:
        while not first_came.wait(_SAY_EVERY_S):
            free = ray.available_resources()
            say(
                f"nothing yet, {time.monotonic() - started:.0f} s: actors {pool.actors}, each with "
                f"{pool.cpus:g} CPUs and {pool.gpus:g} GPUs; free are {free.get('CPU', 0):g} CPUs "
                f"and {free.get('GPU', 0):g} GPUs"
            )

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield first_came
    finally:
        first_came.set()
        thread.join()


def _own_error(error: Exception) -> PavlovError:
    import ray

    if isinstance(error, ray.exceptions.RayActorError):
        return ActorLostError(f"an actor died: {first_line(error)}")
    if not isinstance(error, ray.exceptions.RayTaskError):
        return RunError(f"Ray failed: {first_line(error)}")
    cause = find_cause(error)
    # Ray Data adds lines of its own to the message.
    line = (str(cause).splitlines() or [""])[0]
    if isinstance(cause, PavlovError):
        return type(cause)(line)
    failure = RunError(f"an actor failed: {type(cause).__name__}: {line}")
    failure.add_note(str(error))
    return failure


def _one_task(read: Callable[[], Iterator[pa.Table]]) -> Any:
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Tables(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self,
            parallelism: int,
            per_task_row_limit: int | None = None,
            data_context: Any = None,
        ) -> list[Any]:
            unknown = BlockMetadata(None, None, None, None)
            return [ReadTask(read, unknown, per_task_row_limit=per_task_row_limit)]

        @property
        def supports_distributed_reads(self) -> bool:
            return False

    return Tables()


@contextlib.contextmanager
def _without_complaint(context: Any) -> Iterator[None]:
    """Keep Ray's native code off stderr until the actors of an execution are created.

    It says there, at every start, that actors which Ray Data lets restart may fail to.
    """
    stderr = os.dup(2)

    class Reopen:
        def before_execution_starts(self, executor: object) -> None:
            os.dup2(stderr, 2)

        def __getattr__(self, hook: str) -> Callable[..., None]:
            return lambda *arguments: None

    context.custom_execution_callback_classes = [Reopen]
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
