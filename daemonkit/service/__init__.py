"""Service managers: systemd's notification protocol and the texts of units and init scripts."""
