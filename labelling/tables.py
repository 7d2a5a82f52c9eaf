"""The labelling store's tables. Changes to them are migrations: `labelling/migrations/`.

::

    project ──< prompt ──< answer
       │           └─────< pair >── honeypot        two answers to a prompt, and the known verdict
       │                    └──< demand             judges wanted and taken, by kind of assessor
       ├──< assessor ──< assignment ── judgement    an assignment has one judgement at most
       │        │            └── feedback           what was said when a honeypot was missed
       │        └──< showing                        an answer as the chat server showed it
       └──< audit                                   append only: the database refuses changes

Times are seconds since 1970. The answers of a pair are a and b; which of them stood first is the
assignment's.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, *values: str) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


project = Table(
    "project",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("criteria", JSON, nullable=False),
    # Judgements that the last review has seen.
    Column("reviewed", Integer, nullable=False, server_default="0"),
    Column("created", Float, nullable=False),
)

prompt = Table(
    "prompt",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("messages", JSON, nullable=False),
    UniqueConstraint("project_id", "digest"),
)

answer = Table(
    "answer",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("prompt_id", ForeignKey("prompt.id"), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("text", Text, nullable=False),
    Column("words", Integer, nullable=False),
    Column("model", Text, nullable=False),
    Column("checkpoint", Text, nullable=False),
    Column("finished", Boolean, nullable=False),
    UniqueConstraint("prompt_id", "digest"),
)

pair = Table(
    "pair",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("key", String(64), nullable=False),
    Column("prompt_id", ForeignKey("prompt.id"), nullable=False),
    Column("a_id", ForeignKey("answer.id"), nullable=False),
    Column("b_id", ForeignKey("answer.id"), nullable=False),
    Column("source", Text, nullable=False),
    UniqueConstraint("project_id", "key"),
)

honeypot = Table(
    "honeypot",
    metadata,
    Column("pair_id", ForeignKey("pair.id"), primary_key=True),
    Column("verdict", String(4), nullable=False),
    Column("explanation", Text, nullable=False),
    Column("author_id", ForeignKey("assessor.id")),
    _one_of("verdict", "a", "b", "tie", "bad"),
)

demand = Table(
    "demand",
    metadata,
    Column("pair_id", ForeignKey("pair.id"), primary_key=True),
    Column("kind", String(9), primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("wanted", Integer, nullable=False),
    Column("taken", Integer, nullable=False),
    # The queue's order stands beside the counts, so that one index answers "what is next".
    Column("priority", Float, nullable=False),
    Column("shuffle", BigInteger, nullable=False),
)
Index(
    "ix_demand_queue",
    demand.c.project_id,
    demand.c.kind,
    demand.c.priority.desc(),
    demand.c.taken.desc(),
    demand.c.shuffle,
    sqlite_where=text("taken < wanted"),
    postgresql_where=text("taken < wanted"),
)

assessor = Table(
    "assessor",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("kind", String(9), nullable=False),
    Column("role", String(8), nullable=False),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("state", String(7), nullable=False),
    Column("reason", Text, nullable=False),
    Column("vouched", Float, nullable=False),
    Column("doubted", Boolean, nullable=False),
    Column("created", Float, nullable=False),
    UniqueConstraint("project_id", "name"),
    _one_of("kind", "person", "simulated", "model"),
    _one_of("role", "assessor", "expert", "owner"),
    _one_of("state", "active", "paused", "revoked"),
)

assignment = Table(
    "assignment",
    metadata,
    Column("id", String(24), primary_key=True),
    Column("project_id", ForeignKey("project.id"), nullable=False),
    Column("pair_id", ForeignKey("pair.id"), nullable=False),
    Column("assessor_id", ForeignKey("assessor.id"), nullable=False),
    Column("task", String(8), nullable=False),
    Column("first", String(1), nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("state", String(7), nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    _one_of("task", "work", "honeypot", "repeat"),
    # Empty where a verdict given elsewhere does not say.
    _one_of("first", "a", "b", ""),
    _one_of("state", "open", "done", "skipped", "expired"),
)
# An assessor has one task at a time, and sees a pair once, and once again as a repeat.
Index(
    "uq_assignment_open",
    assignment.c.assessor_id,
    unique=True,
    sqlite_where=text("state = 'open'"),
    postgresql_where=text("state = 'open'"),
)
Index(
    "uq_assignment_seen",
    assignment.c.assessor_id,
    assignment.c.pair_id,
    unique=True,
    sqlite_where=text("task <> 'repeat'"),
    postgresql_where=text("task <> 'repeat'"),
)
Index(
    "uq_assignment_repeated",
    assignment.c.assessor_id,
    assignment.c.pair_id,
    unique=True,
    sqlite_where=text("task = 'repeat'"),
    postgresql_where=text("task = 'repeat'"),
)
Index("ix_assignment_assessor", assignment.c.assessor_id, assignment.c.pair_id)
Index("ix_assignment_pair", assignment.c.pair_id)
Index(
    "ix_assignment_expiry",
    assignment.c.project_id,
    assignment.c.expires,
    sqlite_where=text("state = 'open'"),
    postgresql_where=text("state = 'open'"),
)

judgement = Table(
    "judgement",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("assignment_id", ForeignKey("assignment.id"), nullable=False, unique=True),
    Column("project_id", ForeignKey("project.id"), nullable=False, index=True),
    Column("verdicts", JSON, nullable=False),
    Column("seconds", Float),
    Column("comment", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("doubt", Text, nullable=False),
)

feedback = Table(
    "feedback",
    metadata,
    Column("assignment_id", ForeignKey("assignment.id"), primary_key=True),
    Column("text", Text, nullable=False),
    Column("given", Float, nullable=False),
)

showing = Table(
    "showing",
    metadata,
    Column("id", String(24), primary_key=True),
    Column("answer_id", ForeignKey("answer.id"), nullable=False),
    Column("assessor_id", ForeignKey("assessor.id"), nullable=False),
    # How the answer came about, and what the ensemble said of it.
    Column("completion", Text, nullable=False),
    Column("sampling", JSON, nullable=False),
    Column("verdict", JSON, nullable=False),
    Column("answered", Float, nullable=False),
    # The wording and its version.
    Column("consent", JSON, nullable=False),
    # None where the answer stood beside another: then there is a judgement.
    Column("thumb", String(4)),
    Column("comment", Text, nullable=False),
    Column("at", Float, nullable=False),
    UniqueConstraint("answer_id", "assessor_id"),
    _one_of("thumb", "up", "down"),
)

audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("project_id", ForeignKey("project.id")),
    Column("actor", Text, nullable=False),
    Column("action", String(40), nullable=False),
    Column("details", JSON, nullable=False),
)
