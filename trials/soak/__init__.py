"""`python -m trials soak`: the service under load while all that it depends upon is changed, killed or full.

`stage` is a temporary installation on loopback with a real PostgreSQL and the service as the stack starts it; `traffic`
keeps requests in flight and remembers each answer by its prediction id; every other module is one or two phases, which
return what was expected and what was received. The service is never asked whether a row is there: PostgreSQL is.
"""
