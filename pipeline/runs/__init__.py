"""The whole way: preparation, stages, export, measurement."""
