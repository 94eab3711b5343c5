"""What the Bento ships: runtime (load, self-test, swap), HTTP app, limits, explanations, request log, web page.

Nothing here imports Dagster, training or evaluation code; TensorFlow is imported by `runtime_tensorflow` alone, late.
"""
