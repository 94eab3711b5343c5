"""What the Bento ships, in rooms, of which each knows only those after it:

    app (assembly) → worker (opens its parts) → routes → http (what stands before a route)
    → model | log | capacity → telemetry → machine | problem

Nothing here imports Dagster, training or evaluation code; TensorFlow is imported by `runtime_tensorflow` alone, late.
"""
