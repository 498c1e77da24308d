"""The layers that compression introduces."""
