"""The daemon's mechanics: descriptors, locks, signals, clocks.  Knows nothing of scripts or kinds of children."""
