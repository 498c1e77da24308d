"""What stays on disk: checkpoints, the cache, atomic writes, digests of sources."""
