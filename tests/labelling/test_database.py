import pytest

from labelling.database import Database
from labelling.store import Store
from rlhf.config import LabelConfig, LabelSection, parse_config
from rlhf.errors import ConfigError, DataError, ResourceError


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
