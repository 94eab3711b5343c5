"""The installation as processes: their environment, their commands, and the supervisor that keeps them running."""
