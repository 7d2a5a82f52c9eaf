"""Where judgements are kept: SQLite on one machine, PostgreSQL for many servers.

Both are brought to the newest schema when they are opened (Alembic; `labelling/migrations/`). A
transaction that writes takes SQLite's one write lock at its start, so that what it read still holds
when it writes; every commit is on disk before it returns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from rlhf.errors import DataError, ResourceError

_BUSY_MS = 30_000
_PASSING = ("08", "40", "53", "57")
"""Classes of SQLSTATE after which the same may succeed (PostgreSQL's manual, appendix A): lost
connections, transactions rolled back (deadlocks too), too little room, an operator's shutdown."""
_MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """An open database at the newest schema. `setting` is what errors call its URL.

    Raises:
        DataError: the URL is none, the file is no database, or its schema is a newer Pavlov's.
        ResourceError: there is no answer at the URL; from a transaction too, when the database is
            busy or away, and then it may be tried again.
    """

    def __init__(self, url: str, setting: str = "label.database") -> None:
        try:
            self.url = make_url(url)
            self.sqlite = self.url.get_backend_name() == "sqlite"
            self._engine = _engine(url, sqlite=self.sqlite)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError):
            raise DataError(
                f"{setting} = {_hidden(url)!r} is no URL of SQLite (sqlite:///labels.db) or "
                "PostgreSQL (postgresql://user:password@host/name)"
            ) from None
        if self.sqlite and self.file is None:
            raise DataError(
                f"{setting} = {url!r} would be gone with the process; name a file: "
                "sqlite:///labels.db"
            )
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        # Threads that wait here do so in turn; those that wait for SQLite's lock look and sleep.
        self._turn = threading.Lock() if self.sqlite else contextlib.nullcontext()
        try:
            with self._answering():
                _migrate(self._engine)
        except DBAPIError as error:
            raise DataError(f"{self.name} cannot be used: {_reason(error)}") from None

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self.url.render_as_string(hide_password=True)

    @property
    def file(self) -> Path | None:
        """SQLite's file, if it has one."""
        name = self.url.database
        return Path(name) if self.sqlite and name and name != ":memory:" else None

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that changes nothing."""
        with self._answering(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction; durable when the block has ended, undone when it ended by an error."""
        with self._turn, self._answering(), self._engine.connect() as connection:
            connection.execution_options(writes=True)
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeoutError:
            raise ResourceError(f"{self.name} is busy: all connections are in use") from None
        except DBAPIError as error:
            if not _passes(error):
                raise
            raise ResourceError(f"no answer from {self.name}: {_reason(error)}") from None

    def hold(self) -> Any:
        """Be the one server of a SQLite file; keep what is returned. PostgreSQL has many.

        Raises:
            ResourceError: another server holds it.
        """
        if self.file is None:
            return None
        lock = FileLock(f"{self.file}.server")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                f"{self.file} is served by another process; SQLite has one server: end that one, "
                "or set label.database to a PostgreSQL URL"
            ) from None
        return lock

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _engine(url: str, *, sqlite: bool) -> Engine:
    if not sqlite:
        return create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": _BUSY_MS / 1000}, pool_size=48)

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        # Python's driver would begin transactions at a time of its own.
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout={_BUSY_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            # A row that is replaced is one that is deleted: triggers are to see it.
            "recursive_triggers=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with engine.connect() as connection, connection.execution_options(writes=True).begin():
        if engine.dialect.name == "postgresql":
            # Two servers that start at once: the second waits, and finds it done.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7368616)")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise DataError(
                f"{engine.url.render_as_string()} has a schema that this Pavlov does not know: "
                f"{error}"
            ) from None


def _hidden(url: str) -> str:
    return url.split("@")[-1] if "@" in url else url


def _passes(error: DBAPIError) -> bool:
    """Whether the database is busy or away. pg8000 reports most of that as a ProgrammingError."""
    state = _said(error).get("C", "")
    return isinstance(error, (InterfaceError, OperationalError)) or state.startswith(_PASSING)


def _reason(error: DBAPIError) -> str:
    said = _said(error).get("M") or str(error.orig)
    return said.strip().splitlines()[0][:200]


def _said(error: DBAPIError) -> dict[str, str]:
    """The fields of PostgreSQL's error message: C is its SQLSTATE, M the text."""
    said = error.orig.args[0] if error.orig and error.orig.args else None
    return said if isinstance(said, dict) else {}
