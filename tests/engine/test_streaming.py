"""Tables through actors by Ray Data, on one core: order, errors, and an actor that dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from cluster.layout import usable_cores
from cluster.session import ray_session
from cluster.streaming import stream_through_actors
from rlhf.errors import DataError, ModelError, RunError
from tests.engine.streamed import TABLE_ROWS, Broken, DyingOnce, Echo, Refusing, read

pytestmark = pytest.mark.engine

TABLES = 30


@pytest.fixture(scope="module", autouse=True)
def one_core() -> Iterator[None]:
    with ray_session("streaming", num_cpus=1):
        yield


def test_a_stream_comes_back_whole_in_order_and_quietly_on_one_core(
    capfd: pytest.CaptureFixture[str],
) -> None:
    parts = list(stream_through_actors(partial(read, TABLES), Echo, {}, use_gpus=False))
    assert len(parts) > 1
    rows = [row for part in parts for row in part.to_pylist()]
    assert [row["line"] for row in rows] == list(range(TABLES * TABLE_ROWS))
    assert len({row["pid"] for row in rows}) == 1
    assert {row["threads"] for row in rows} == {str(usable_cores())}
    assert capfd.readouterr() == ("", "")


def test_what_the_reader_raises_comes_out_as_its_one_sentence_after_what_was_read() -> None:
    stream = stream_through_actors(partial(read, TABLES, True), Echo, {}, use_gpus=False)
    with pytest.raises(DataError) as raised:
        list(stream)
    assert str(raised.value) == "rows.jsonl is cut short; fetch it again"


def test_what_an_actor_raises_comes_out_as_its_one_sentence() -> None:
    with pytest.raises(ModelError) as raised:
        list(stream_through_actors(partial(read, 1), Refusing, {}, use_gpus=False))
    assert str(raised.value) == "trained on another backbone"
    with pytest.raises(RunError, match="ZeroDivisionError: of all things"):
        list(stream_through_actors(partial(read, 1), Broken, {}, use_gpus=False))


def test_an_actor_that_dies_is_started_again_and_no_row_is_lost_or_doubled(tmp_path: Path) -> None:
    mark = tmp_path / "died"
    arguments = {"mark": str(mark)}
    parts = stream_through_actors(partial(read, TABLES), DyingOnce, arguments, use_gpus=False)
    rows = [row for part in parts for row in part.to_pylist()]
    assert [row["line"] for row in rows] == list(range(TABLES * TABLE_ROWS))
    assert mark.exists()


def test_a_stream_that_is_left_half_way_ends_and_the_next_one_runs() -> None:
    stream = stream_through_actors(partial(read, TABLES), Echo, {}, use_gpus=False)
    assert next(stream).num_rows
    stream.close()
    assert len(list(stream_through_actors(partial(read, 1), Echo, {}, use_gpus=False))) == 1


def test_who_waits_for_a_busy_cluster_is_told_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr("cluster.streaming._SAY_EVERY_S", 0.3)
    held = placement_group([{"CPU": 1}])
    ray.get(held.ready())
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            remove_placement_group(held)

    parts = list(stream_through_actors(partial(read, 1), Echo, {}, use_gpus=False, say=say))
    assert sum(part.num_rows for part in parts) == TABLE_ROWS
    assert "actors 1, each with 0.6 CPUs and 0 GPUs; free are 0 CPUs and 0 GPUs" in said[0]
    told = len(said)
    time.sleep(1)
    assert len(said) == told
