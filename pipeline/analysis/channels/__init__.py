"""Which channels of a model belong together, and the surgery that takes them out."""
