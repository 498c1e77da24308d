"""What is true of a model: cost, layers, moments, gradients, channels."""
