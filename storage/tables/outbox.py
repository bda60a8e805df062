"""Messages on their way to the streams."""

from sqlalchemy import BigInteger, Column, Identity, Table, Text

from storage.tables.common import col, created, metadata

# `payload` holds one JSON document a line; the relay sends each as a stream entry and then deletes the row.
outbox_messages = Table(
    "messages",
    metadata,
    Column("message_id", BigInteger, Identity(), primary_key=True),
    col("topic", Text()),
    col("name", Text()),
    col("payload", Text()),
    created(),
    schema="outbox",
)
