"""Everything that forks: one way to do it, one server that does it, and what stands on that."""
