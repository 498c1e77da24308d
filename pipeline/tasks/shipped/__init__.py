"""The tasks that a recipe can name: each is a module with a function of its own name."""
