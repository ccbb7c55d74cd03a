"""Who a run is, provably: principals, Ed25519 tokens, and the encrypted form of the keys. No files, no sockets."""
