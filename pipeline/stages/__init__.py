"""The compression stages, one folder or file each, with a `STAGE`; `stage_registry` finds them by name."""
