"""The process: its temporary folders, its children, its signals, and the streams that it prints to."""
