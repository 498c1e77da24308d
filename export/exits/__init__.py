"""Exits as `If` branches: levels, policies, rows that leave, split files, and where weights lie."""
