"""Alembic's entry point: migrate on the connection, and in the schema, that the caller hands over."""

from alembic import context

from orchestrator.migrations import VERSION_TABLE
from orchestrator.schema import SCHEMA, metadata

connection = context.config.attributes["connection"]
schema = context.config.attributes["schema"]

context.configure(
    connection=connection.execution_options(schema_translate_map={SCHEMA: schema}),
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    version_table_schema=schema,
    include_schemas=True,
)
context.run_migrations()
