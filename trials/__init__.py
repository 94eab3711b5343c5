"""Proofs under faults: what must hold while something breaks, each line with what was expected and what was received.

`soak` is the service under load, `stack` the stack in containers, `prove_cifar` the whole graph on other images. How
servers are started, loaded and measured is `benchmarks`' part, which trials use and which knows nothing of them.
"""
