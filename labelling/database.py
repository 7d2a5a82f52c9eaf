"""Where judgements are kept: SQLite on one machine, PostgreSQL for many servers.

Both are brought to the newest schema when they are opened (Alembic; `labelling/migrations/`). A
transaction that writes takes SQLite's one write lock at its start, so that what it read still holds
when it writes; every commit is on disk before it returns.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, inspect, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    SAWarning,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from labelling.tables import metadata
from rlhf.errors import DataError, ResourceError

_BUSY_MS = 30_000
_WRITES = "BEGIN IMMEDIATE"
_SAY_TABLES = 3
_PASSING = ("08", "40", "53", "57")
"""Classes of SQLSTATE after which the same may succeed (PostgreSQL's manual, appendix A): lost
connections, transactions rolled back (deadlocks too), too little room, an operator's shutdown."""
_DAMAGED = ("58", "XX", "42P01", "42501")
"""The same of a broken disk, damaged pages, a table that is gone, and rights that are."""
_MIGRATIONS = Path(__file__).parent / "migrations"
_TRIES = 8
Made = TypeVar("Made")


class Database:
    """An open database at the newest schema.

    Args:
        setting: what errors call its URL.
        make: whether a SQLite file is made where there is none.

    Raises:
        DataError: the URL is none, the file is missing, no database or another program's, or its
            schema is a newer Pavlov's.
        ResourceError: there is no answer at the URL; from a transaction too, when the database is
            busy or away, and then it may be tried again, or when it is damaged.
    """

    def __init__(self, url: str, setting: str = "label.database", *, make: bool = True) -> None:
        try:
            self.url = make_url(url)
            self.sqlite = self.url.get_backend_name() == "sqlite"
            self._engine = _engine(url, sqlite=self.sqlite)
        except (ArgumentError, NoSuchModuleError, ImportError, ValueError):
            raise DataError(
                f"{setting} = {_hidden(url)!r} is no URL of SQLite (sqlite:///labels.db) or "
                "PostgreSQL (postgresql://user:password@host/name)"
            ) from None
        except TypeError as error:
            raise DataError(
                f"{setting} = {_hidden(url)!r} is not what the driver takes ({error}); "
                "PostgreSQL's is postgresql://user:password@host/name without options"
            ) from None
        if self.sqlite and self.file is None:
            raise DataError(
                f"{setting} = {url!r} would be gone with the process; name a file: "
                "sqlite:///labels.db"
            )
        if self.file is not None:
            if not make and not self.file.exists():
                raise DataError(
                    f"{setting}: there is no database {self.file}; correct the name, or make it "
                    "with `pavlov label import`"
                )
            self.file.parent.mkdir(parents=True, exist_ok=True)
        # Threads that wait here do so in turn; those that wait for SQLite's lock look and sleep.
        self._turn = threading.Lock() if self.sqlite else contextlib.nullcontext()
        with self._answering(opening=True):
            _migrate(self._engine)
            if self.sqlite:
                # Not before: another program's file is left as it is. It stays so once it is done,
                # and of those that do it at once all but one are told that it is locked.
                with (
                    self._engine.connect().execution_options(begin="") as connection,
                    contextlib.suppress(OperationalError),
                ):
                    connection.exec_driver_sql("PRAGMA journal_mode=WAL")

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
            connection.execution_options(begin=_WRITES)
            with connection.begin():
                yield connection

    def change(self, make: Callable[[Connection], Made]) -> Made:
        """What `make` returns of a transaction that writes; begun anew where another was first with
        a row that both need: now that row is found.

        Raises:
            IntegrityError: that was so each time, or the row is no other's.
        """
        for _ in range(_TRIES - 1):
            with contextlib.suppress(IntegrityError), self.writing() as db:
                return make(db)
        with self.writing() as db:
            return make(db)

    @contextlib.contextmanager
    def _answering(self, *, opening: bool = False) -> Iterator[None]:
        """What the driver says of the database in one sentence, without SQL and its parameters."""
        try:
            yield
        except PoolTimeoutError:
            raise ResourceError(f"{self.name} is busy: all connections are in use") from None
        except DBAPIError as error:
            if _passes(error):
                raise ResourceError(f"no answer from {self.name}: {_reason(error)}") from None
            if not opening and not _damaged(error):
                raise
            kind = DataError if opening else ResourceError
            raise kind(f"{self.name} cannot be used: {_reason(error)}") from None

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
        engine = create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True)
        arguments, named = engine.dialect.create_connect_args(engine.url)
        signature(engine.dialect.loaded_dbapi.connect).bind(*arguments, **named)
        return engine
    engine = create_engine(url, connect_args={"timeout": _BUSY_MS / 1000}, pool_size=48)

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        # Python's driver would begin transactions at a time of its own.
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout={_BUSY_MS}",
            "synchronous=FULL",
            "foreign_keys=ON",
            # A row that is replaced is one that is deleted: triggers are to see it.
            "recursive_triggers=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        if begin := connection.get_execution_options().get("begin", "BEGIN"):
            connection.exec_driver_sql(begin)

    return engine


def _migrate(engine: Engine) -> None:
    from alembic.util.exc import CommandError

    name = engine.url.render_as_string()
    with engine.connect() as connection, connection.execution_options(begin=_WRITES).begin():
        if engine.dialect.name == "postgresql":
            # Two servers that start at once: the second waits, and finds it done.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7368616)")
        try:
            _refuse_another_programs(connection, name)
            _upgrade(connection, "head")
        except CommandError as error:
            raise DataError(
                f"{name} has a schema that this Pavlov does not know: {error}"
            ) from None


def _upgrade(connection: Connection, to: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, to)


def _refuse_another_programs(connection: Connection, name: str) -> None:
    """Do nothing where there are no tables, or those of the recorded revision.

    Raises:
        DataError: it is another program's database.
        CommandError: the revision is not known.
    """
    from alembic.migration import MigrationContext

    found = _columns(connection)
    recorded: tuple[str, ...] = ()
    if "version_num" in found.pop("alembic_version", ()):
        recorded = MigrationContext.configure(connection).get_current_heads()
    if not found:
        return
    if not recorded or found.keys().isdisjoint(metadata.tables):
        raise DataError(
            f"{name} is another program's database, with the tables "
            f"{', '.join(sorted(found)[:_SAY_TABLES])}; name another"
        )
    with create_engine("sqlite://", poolclass=NullPool).begin() as empty:
        for revision in recorded:
            _upgrade(empty, revision)
        ours = _columns(empty)
    del ours["alembic_version"]
    wanted = {f"{table}.{column}" for table, columns in ours.items() for column in columns}
    there = {f"{table}.{column}" for table, columns in found.items() for column in columns}
    if lacks := sorted(wanted - there):
        raise DataError(
            f"{name} is another program's database, or a damaged one: it lacks "
            f"{', '.join(lacks[:_SAY_TABLES])}; name another"
        )


def _columns(connection: Connection) -> dict[str, set[str]]:
    """The names of all tables' columns."""
    with warnings.catch_warnings():
        # Another program's types need not be known.
        warnings.simplefilter("ignore", SAWarning)
        found = inspect(connection).get_multi_columns()
    return {name: {each["name"] for each in columns} for (_, name), columns in found.items()}


def _hidden(url: str) -> str:
    return url.split("@")[-1] if "@" in url else url


def _passes(error: DBAPIError) -> bool:
    """Whether the database is busy or away. pg8000 reports most of that as a ProgrammingError."""
    state = _said(error).get("C", "")
    return isinstance(error, (InterfaceError, OperationalError)) or state.startswith(_PASSING)


def _damaged(error: DBAPIError) -> bool:
    """Whether the database is no longer what it was when it was opened. sqlite3 has no class of its
    own for that."""
    state = _said(error).get("C", "")
    return type(error) is DatabaseError or state.startswith(_DAMAGED)


def _reason(error: DBAPIError) -> str:
    said = _said(error).get("M") or str(error.orig)
    return said.strip().splitlines()[0][:200]


def _said(error: DBAPIError) -> dict[str, str]:
    """The fields of PostgreSQL's error message: C is its SQLSTATE, M the text."""
    said = error.orig.args[0] if error.orig and error.orig.args else None
    return said if isinstance(said, dict) else {}
