"""Architectures, and the layers that compression introduces."""
