"""Whether a bundle answers here as it did where it was made."""
