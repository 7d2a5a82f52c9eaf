"""Alembic's entry: migrates over the connection that `labelling.database` opened."""

from alembic import context

from labelling.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
