"""Text from a generator bundle: sampling, generation and its command."""
