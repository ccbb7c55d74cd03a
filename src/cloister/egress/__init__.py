"""Which connection is allowed: allowlist, address guard, and parsers for what clients send. Decides, never connects."""
