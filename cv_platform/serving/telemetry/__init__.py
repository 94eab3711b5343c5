"""What the service says of itself: metrics, traces, the lines of its log."""
