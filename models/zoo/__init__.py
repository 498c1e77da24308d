"""The architectures that ship."""
