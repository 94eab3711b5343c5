"""The model that a worker serves: runtimes, the holder that swaps it, the production pointer, explanations."""
