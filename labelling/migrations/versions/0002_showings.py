"""Answers as the chat server showed them to those who gave feedback on them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "showing",
        sa.Column("id", sa.String(length=24), nullable=False),
        sa.Column("answer_id", sa.Integer(), nullable=False),
        sa.Column("assessor_id", sa.Integer(), nullable=False),
        sa.Column("completion", sa.Text(), nullable=False),
        sa.Column("sampling", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.JSON(), nullable=False),
        sa.Column("answered", sa.Float(), nullable=False),
        sa.Column("consent", sa.JSON(), nullable=False),
        sa.Column("thumb", sa.String(length=4), nullable=True),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.CheckConstraint("thumb IN ('up', 'down')", name="ck_showing_thumb"),
        sa.ForeignKeyConstraint(["answer_id"], ["answer.id"], name="fk_showing_answer_id"),
        sa.ForeignKeyConstraint(["assessor_id"], ["assessor.id"], name="fk_showing_assessor_id"),
        sa.PrimaryKeyConstraint("id", name="pk_showing"),
        sa.UniqueConstraint("answer_id", "assessor_id", name="uq_showing_answer_id_assessor_id"),
    )
