"""`python -m trials stack`: the stack in containers, proven on a real engine.

`checkout` is a copy of what the stack starts from, with passwords, ports, a project name and volumes of its own, so
that nobody's stack is touched; `stage`, `dagster_api` and `promql` ask the running stack what it knows; `run` plays the
phases, which are the other modules, one or two in each, and say what was expected and what was received. What was
answered is looked up in PostgreSQL.
"""
