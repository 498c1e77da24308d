"""Language models with a KV cache in one graph."""
