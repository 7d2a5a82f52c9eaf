"""Stores to test on: SQLite, and PostgreSQL where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from labelling.database import Database
from labelling.store import Store
from rlhf.config.label import LabelSection
from tests.postgres import binaries, postgresql


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/labels.db"
    else:
        url = LabelSection(database=request.getfixturevalue("postgres_url")).url
    database = Database(url)
    yield Store(database)
    if request.param == "postgresql":
        with database.writing() as db:
            db.exec_driver_sql("DROP SCHEMA public CASCADE")
            db.exec_driver_sql("CREATE SCHEMA public")
    database.close()
