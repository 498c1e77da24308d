"""What devices can do: one JSON file per target, read by exports, by pruning and by `doctor`."""
