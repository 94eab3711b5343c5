"""What stands before a route: who may call, what a request may carry, how refusals look, and how a body is received."""
