"""What several tests stand on: waiting, models, Postgres, served apps. Fixtures of a folder stay in its conftest."""
