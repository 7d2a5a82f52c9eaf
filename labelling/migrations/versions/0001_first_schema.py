"""The first schema, and triggers that keep the audit trail append-only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "project",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=80), nullable=False),
        sa.Column("criteria", sa.JSON(), nullable=False),
        sa.Column("reviewed", sa.Integer(), server_default="0", nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_project"),
        sa.UniqueConstraint("name", name="uq_project_name"),
    )
    op.create_table(
        "assessor",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=9), nullable=False),
        sa.Column("role", sa.String(length=8), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=7), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("vouched", sa.Float(), nullable=False),
        sa.Column("doubted", sa.Boolean(), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.CheckConstraint("kind IN ('person', 'simulated', 'model')", name="ck_assessor_kind"),
        sa.CheckConstraint("role IN ('assessor', 'expert', 'owner')", name="ck_assessor_role"),
        sa.CheckConstraint("state IN ('active', 'paused', 'revoked')", name="ck_assessor_state"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_assessor_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_assessor"),
        sa.UniqueConstraint("project_id", "name", name="uq_assessor_project_id_name"),
        sa.UniqueConstraint("token_hash", name="uq_assessor_token_hash"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=True),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.String(length=40), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_audit_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )
    op.create_table(
        "prompt",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_prompt_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_prompt"),
        sa.UniqueConstraint("project_id", "digest", name="uq_prompt_project_id_digest"),
    )
    op.create_table(
        "answer",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("words", sa.Integer(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("checkpoint", sa.Text(), nullable=False),
        sa.Column("finished", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompt.id"], name="fk_answer_prompt_id"),
        sa.PrimaryKeyConstraint("id", name="pk_answer"),
        sa.UniqueConstraint("prompt_id", "digest", name="uq_answer_prompt_id_digest"),
    )
    op.create_table(
        "pair",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("prompt_id", sa.Integer(), nullable=False),
        sa.Column("a_id", sa.Integer(), nullable=False),
        sa.Column("b_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["a_id"], ["answer.id"], name="fk_pair_a_id"),
        sa.ForeignKeyConstraint(["b_id"], ["answer.id"], name="fk_pair_b_id"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_pair_project_id"),
        sa.ForeignKeyConstraint(["prompt_id"], ["prompt.id"], name="fk_pair_prompt_id"),
        sa.PrimaryKeyConstraint("id", name="pk_pair"),
        sa.UniqueConstraint("project_id", "key", name="uq_pair_project_id_key"),
    )
    op.create_table(
        "assignment",
        sa.Column("id", sa.String(length=24), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("pair_id", sa.Integer(), nullable=False),
        sa.Column("assessor_id", sa.Integer(), nullable=False),
        sa.Column("task", sa.String(length=8), nullable=False),
        sa.Column("first", sa.String(length=1), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=7), nullable=False),
        sa.Column("created", sa.Float(), nullable=False),
        sa.Column("expires", sa.Float(), nullable=False),
        sa.CheckConstraint("first IN ('a', 'b', '')", name="ck_assignment_first"),
        sa.CheckConstraint(
            "state IN ('open', 'done', 'skipped', 'expired')", name="ck_assignment_state"
        ),
        sa.CheckConstraint("task IN ('work', 'honeypot', 'repeat')", name="ck_assignment_task"),
        sa.ForeignKeyConstraint(["assessor_id"], ["assessor.id"], name="fk_assignment_assessor_id"),
        sa.ForeignKeyConstraint(["pair_id"], ["pair.id"], name="fk_assignment_pair_id"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_assignment_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_assignment"),
    )
    op.create_index(
        "ix_assignment_assessor", "assignment", ["assessor_id", "pair_id"], unique=False
    )
    op.create_index(
        "ix_assignment_expiry",
        "assignment",
        ["project_id", "expires"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index("ix_assignment_pair", "assignment", ["pair_id"], unique=False)
    op.create_index(
        "uq_assignment_open",
        "assignment",
        ["assessor_id"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "uq_assignment_repeated",
        "assignment",
        ["assessor_id", "pair_id"],
        unique=True,
        sqlite_where=sa.text("task = 'repeat'"),
        postgresql_where=sa.text("task = 'repeat'"),
    )
    op.create_index(
        "uq_assignment_seen",
        "assignment",
        ["assessor_id", "pair_id"],
        unique=True,
        sqlite_where=sa.text("task <> 'repeat'"),
        postgresql_where=sa.text("task <> 'repeat'"),
    )
    op.create_table(
        "demand",
        sa.Column("pair_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=9), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("wanted", sa.Integer(), nullable=False),
        sa.Column("taken", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Float(), nullable=False),
        sa.Column("shuffle", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["pair_id"], ["pair.id"], name="fk_demand_pair_id"),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_demand_project_id"),
        sa.PrimaryKeyConstraint("pair_id", "kind", name="pk_demand"),
    )
    op.create_index(
        "ix_demand_queue",
        "demand",
        [
            "project_id",
            "kind",
            sa.literal_column("priority DESC"),
            sa.literal_column("taken DESC"),
            "shuffle",
        ],
        unique=False,
        sqlite_where=sa.text("taken < wanted"),
        postgresql_where=sa.text("taken < wanted"),
    )
    op.create_table(
        "honeypot",
        sa.Column("pair_id", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(length=4), nullable=False),
        sa.Column("explanation", sa.Text(), nullable=False),
        sa.Column("author_id", sa.Integer(), nullable=True),
        sa.CheckConstraint("verdict IN ('a', 'b', 'tie', 'bad')", name="ck_honeypot_verdict"),
        sa.ForeignKeyConstraint(["author_id"], ["assessor.id"], name="fk_honeypot_author_id"),
        sa.ForeignKeyConstraint(["pair_id"], ["pair.id"], name="fk_honeypot_pair_id"),
        sa.PrimaryKeyConstraint("pair_id", name="pk_honeypot"),
    )
    op.create_table(
        "feedback",
        sa.Column("assignment_id", sa.String(length=24), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("given", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignment.id"], name="fk_feedback_assignment_id"
        ),
        sa.PrimaryKeyConstraint("assignment_id", name="pk_feedback"),
    )
    op.create_table(
        "judgement",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("assignment_id", sa.String(length=24), nullable=False),
        sa.Column("project_id", sa.Integer(), nullable=False),
        sa.Column("verdicts", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=True),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("doubt", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["assignment_id"], ["assignment.id"], name="fk_judgement_assignment_id"
        ),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name="fk_judgement_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_judgement"),
        sa.UniqueConstraint("assignment_id", name="uq_judgement_assignment_id"),
    )
    op.create_index("ix_judgement_project_id", "judgement", ["project_id"], unique=False)
    for statement in _APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)


_APPEND_ONLY = {
    "sqlite": [
        f"""
        CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit trail is append-only'); END
        """
        for verb in ("update", "delete")
    ],
    "postgresql": [
        """
        CREATE FUNCTION audit_append_only() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'the audit trail is append-only'; END $$
        """,
        """
        CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_append_only()
        """,
    ],
}
