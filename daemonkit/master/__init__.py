"""The daemon's own process: its program, and what a signal, a request or a due job leads to."""
