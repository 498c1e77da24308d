"""Latency that can be trusted: fresh processes, interleaved comparisons, and their statistics."""
