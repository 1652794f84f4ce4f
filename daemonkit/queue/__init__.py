"""Tasks that others have put, run by the daemon: brokers, the tasks a script declares, and their consumer."""
