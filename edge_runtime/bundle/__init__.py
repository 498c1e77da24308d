"""The bundle: its manifest, its files and hashes, golden cases, and the archive of this runtime that it carries."""
