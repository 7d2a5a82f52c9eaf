"""Stores to test on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from labelling.database import Database
from labelling.store import Store
from rlhf.config.label import database_url


@pytest.fixture
def store(labels_url: str) -> Iterator[Store]:
    database = Database(database_url(labels_url))
    yield Store(database)
    database.close()
