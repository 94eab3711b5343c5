"""Judges a dataset version before anything is trained on it: exact checks, Deepchecks' suites, likely wrong labels."""
