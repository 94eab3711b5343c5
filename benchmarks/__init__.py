"""Side-by-side benchmarks: what the platform does against a replica of how the original did it, in one run.

`python -m benchmarks` runs them all; each prints a table, ratios with their intervals and the machine, and writes the
same as JSON. `harness` measures; `original_*` are the replicas; `bench_*` are the comparisons; `prove_cifar` is no
benchmark but a proof that the graph runs on other images by config alone. Nothing in `cv_platform` imports this.
"""
