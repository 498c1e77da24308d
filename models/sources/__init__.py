"""How a name, a file or a library becomes a module with weights."""
