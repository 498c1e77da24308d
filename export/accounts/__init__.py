"""What a graph stores and computes: bytes, MACs, and weights that are there twice."""
