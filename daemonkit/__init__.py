"""Turn a Python script into a Unix daemon."""
