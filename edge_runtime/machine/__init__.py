"""What this machine is: its processor, its heat, and whether a session can be made on it."""
