"""The request log's database: tables, migrations, connections, and the PostgreSQL that comes with the installation."""
