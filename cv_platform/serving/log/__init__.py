"""The request log: the entry, the durable spool, the drainer, the tables in PostgreSQL, deletion, the passport."""
