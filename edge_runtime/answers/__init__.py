"""What the outputs of a model mean: a file for each kind of answer, and `table.KINDS` with all of them. NumPy only."""
