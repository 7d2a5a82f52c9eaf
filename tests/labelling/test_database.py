import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, exc, inspect

from labelling.database import Database
from labelling.store import Store
from rlhf.config import LabelConfig, LabelSection, parse_config
from rlhf.config.label import database_url
from rlhf.errors import ConfigError, DataError, PavlovError, ResourceError


@pytest.fixture
def on_postgres(postgres_url: str) -> Iterator[Database]:
    database = Database(database_url(postgres_url))
    yield database
    with database.writing() as db:
        db.exec_driver_sql("DROP SCHEMA public CASCADE")
        db.exec_driver_sql("CREATE SCHEMA public")
    database.close()


def test_a_connection_that_is_lost_is_no_answer_and_the_next_one_is_good(on_postgres):
    own = "SELECT pg_backend_pid()"
    for then in ("SELECT 1", ""):
        with pytest.raises(ResourceError, match="no answer from postgresql"):
            with on_postgres.writing() as db:
                pid = db.exec_driver_sql(own).scalar_one()
                with on_postgres.writing() as other:
                    other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 5000)")
                if then:
                    db.exec_driver_sql(then)
                # Else it is lost by the commit.
        with on_postgres.reading() as db:
            assert db.exec_driver_sql("SELECT 1").scalar_one() == 1


def test_of_two_that_wait_for_each_other_one_gets_no_answer_and_may_try_again(on_postgres):
    with on_postgres.writing() as db:
        db.exec_driver_sql("CREATE TABLE two (id int)")
        db.exec_driver_sql("INSERT INTO two VALUES (1), (2)")
    both_have_one, failures = threading.Barrier(2, timeout=30), list[Exception]()

    def take(first: int, then: int) -> None:
        try:
            with on_postgres.writing() as db:
                db.exec_driver_sql(f"UPDATE two SET id = id WHERE id = {first}")
                both_have_one.wait()
                db.exec_driver_sql(f"UPDATE two SET id = id WHERE id = {then}")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=take, args=order) for order in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [failure] = failures
    assert isinstance(failure, ResourceError)
    assert str(failure).endswith(": deadlock detected")


def test_a_transaction_that_cannot_be_put_in_order_gets_no_answer(on_postgres):
    with on_postgres.writing() as db:
        db.exec_driver_sql("CREATE TABLE one (id int)")
        db.exec_driver_sql("INSERT INTO one VALUES (1)")
    with pytest.raises(ResourceError, match="could not serialize access"):
        with on_postgres.writing() as db:
            db.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            db.exec_driver_sql("SELECT * FROM one")
            with on_postgres.writing() as other:
                other.exec_driver_sql("UPDATE one SET id = 2")
            db.exec_driver_sql("UPDATE one SET id = 3")


def test_a_database_without_a_free_connection_is_busy(on_postgres, monkeypatch):
    narrow = create_engine(on_postgres.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    monkeypatch.setattr(on_postgres, "_engine", narrow)
    with on_postgres.reading(), pytest.raises(ResourceError, match="is busy: all connections"):
        with on_postgres.reading():
            pass
    narrow.dispose()
    monkeypatch.undo()


def test_a_statement_that_is_wrong_is_an_error_of_ours(store):
    with pytest.raises((exc.ProgrammingError, exc.IntegrityError)):
        with store.database.writing() as db:
            db.exec_driver_sql("INSERT INTO honeypot (pair_id) VALUES (NULL)")


def test_a_sqlite_file_has_one_server_and_many_readers(tmp_path):
    url = f"sqlite:///{tmp_path}/labels.db"
    first, second = Database(url), Database(url)
    held = first.hold()
    with pytest.raises(ResourceError, match="is served by another process"):
        second.hold()
    assert Store(second).make_project("x", []).name == "x"
    held.release()
    second.hold().release()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("labels.db", "is no URL"),
        ("mysql://host/labels", "is no URL"),
        ("postgresql://ann:secret@host:port/labels", "'host:port/labels' is no URL"),
        ("postgresql+pg8000:///labels", "missing a required argument: 'user'"),
        ("postgresql+pg8000://ann:secret@host/d?sslmode=require", "'host/d.* argument 'sslmode'"),
        ("sqlite://", "gone with the process"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(DataError, match=message):
        Database(url)


def test_no_answer_and_no_database_are_told_apart(tmp_path):
    with pytest.raises(ResourceError, match=r"no answer from .*\*\*\*@127.0.0.1:9"):
        Database(LabelSection(database="postgresql://ann:secret@127.0.0.1:9/labels").url)
    (tmp_path / "labels.db").write_text("not a database at all" * 100)
    with pytest.raises(DataError, match="not a database"):
        Database(f"sqlite:///{tmp_path}/labels.db")


def test_a_schema_of_a_newer_pavlov_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/labels.db"
    database = Database(url)
    with database.writing() as db:
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.close()
    with pytest.raises(DataError, match="schema that this Pavlov does not know"):
        Database(url)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"replicas": 2}, "SQLite has one server"),
        ({"port": 65536}, "less than or equal to 65535"),
        ({"judges_per_pair": 1001}, "less than or equal to 1000"),
        ({"criteria": ["Helpful!"]}, "no name for a criterion"),
        ({"criteria": ["overall"]}, "overall is always asked"),
        ({"criteria": ["helpful", "helpful"]}, "names one twice"),
        ({"attention": {"honeypot_share": 0.6, "repeat_share": 0.5}}, "nothing is left for work"),
    ],
)
def test_settings_that_clash_are_refused(label, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(LabelConfig, {"label": label}, "test")


def test_the_schema_is_what_the_migrations_make(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from labelling.tables import metadata

    with store.database.reading() as db:
        found = compare_metadata(MigrationContext.configure(db), metadata)
    # The queue's order cannot be read back as expressions by either database.
    assert [each for each in found if "ix_demand_queue" not in str(each)] == []


def test_what_a_database_cannot_do_is_one_sentence_without_sql_or_what_was_to_be_kept(store):
    with (
        pytest.raises(ResourceError, match=r"(no such table: gone|\"gone\" does not exist)$") as a,
        store.database.writing() as db,
    ):
        db.exec_driver_sql("INSERT INTO gone VALUES ('secret')")
    with pytest.raises(ResourceError) as b, store.database.reading() as db:
        db.exec_driver_sql("SELECT secret FROM gone")
    for told in map(str, (a.value, b.value)):
        assert not {"secret", "INSERT", "SELECT", "{"} & set(told.replace("'", " ").split())
        assert "\n" not in told


def test_a_row_that_is_there_already_is_left_to_whoever_wrote_it(store):
    store.make_project("chat", [])
    with pytest.raises(exc.IntegrityError), store.database.writing() as db:
        db.exec_driver_sql("INSERT INTO project SELECT * FROM project")


def test_a_damaged_file_is_one_sentence(tmp_path):
    file = tmp_path / "labels.db"
    Database(f"sqlite:///{file}").close()
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(PavlovError, match="malformed"):
        Store(Database(f"sqlite:///{file}")).make_project("chat", [])


def test_another_programs_file_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / "other.db"
    with sqlite3.connect(file) as other:
        other.execute("CREATE TABLE songs (name TEXT)")
    other.close()
    before = file.read_bytes()
    with pytest.raises(DataError, match="another program's database, with the tables songs"):
        Database(f"sqlite:///{file}")
    assert file.read_bytes() == before


FOREIGN = {
    "songs": ["CREATE TABLE songs (name TEXT)"],
    # Names of ours, with other columns.
    "project, prompt": ["CREATE TABLE project (id INT)", "CREATE TABLE prompt (id INT)"],
    "alembic of its own": [
        "CREATE TABLE songs (name TEXT)",
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('a1b2c3')",
    ],
    "a revision called as ours": [
        "CREATE TABLE project (id INT)",
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('0001')",
    ],
    "a version of something else": [
        "CREATE TABLE songs (name TEXT)",
        "CREATE TABLE alembic_version (number INT)",
    ],
}


@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN.keys())
def test_another_programs_database_is_refused_and_nothing_made_in_it(labels_url, statements):
    url = database_url(labels_url)
    other = create_engine(url)

    def schema() -> object:
        with other.connect() as db:
            tables = inspect(db).get_multi_columns()
            return {name: [each["name"] for each in columns] for name, columns in tables.items()}

    with other.begin() as db:
        for statement in statements:
            db.exec_driver_sql(statement)
    before = schema()
    file = other.url.database if other.dialect.name == "sqlite" else None
    content = file and Path(file).read_bytes()
    with pytest.raises(DataError, match="is another program's database, ") as told:
        Database(url)
    assert "\n" not in str(told.value)
    assert schema() == before
    assert not file or Path(file).read_bytes() == content
    with other.begin() as db:
        for _, table in before:
            db.exec_driver_sql(f"DROP TABLE {table}")
    other.dispose()


def test_our_database_may_have_tables_of_others_beside_and_none_of_ours_less(labels_url):
    url = database_url(labels_url)
    database = Database(url)
    with database.writing() as db:
        db.exec_driver_sql("CREATE TABLE songs (name TEXT)")
    Database(url).close()
    with database.writing() as db:
        db.exec_driver_sql("ALTER TABLE feedback RENAME TO before")
    with pytest.raises(DataError, match=r"or a damaged one: it lacks feedback\.assignment_id"):
        Database(url)
    with database.writing() as db:
        db.exec_driver_sql("ALTER TABLE before RENAME TO feedback")
    database.close()


def test_a_database_is_made_only_where_one_is_wanted(tmp_path):
    url = f"sqlite:///{tmp_path}/new/labels.db"
    with pytest.raises(DataError, match=r"there is no database .*labels\.db"):
        Database(url, make=False)
    assert not (tmp_path / "new").exists()
    Database(url).close()
    Database(url, make=False).close()
