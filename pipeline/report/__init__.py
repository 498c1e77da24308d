"""What a run found, as rows and as a page."""
