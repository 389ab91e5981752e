"""What is measured or searched once: importance, thresholds, routers, drops."""
