"""The data plane: asyncio protocols that carry bytes and ask `egress` what to do with them. Holds no policy of its own."""
