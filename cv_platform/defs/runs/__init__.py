"""Runs that are at work, and those whose process is gone."""
