"""Rules. Standard library only: no clock, no randomness, no I/O; they come as arguments."""
