"""The training loop, what it needs of a model, and evaluation."""
