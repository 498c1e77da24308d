"""The flat graph: captured from PyTorch, simplified, written to files."""
