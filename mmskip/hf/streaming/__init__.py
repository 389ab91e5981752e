"""KV caches of running streams."""
