"""Parity of the file with PyTorch, on every branch and at every optimization level."""
