"""One file per method: its config, its mathematics, and the handlers that register it."""
