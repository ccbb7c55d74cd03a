"""The data plane: asyncio protocols that carry bytes and ask `egress` what to do with them.

Holds no policy of its own. A connection that is being decided about belongs to `forward` or
`socks`; one that was decided about is an `upstream` exchange or a `tunnel`.
"""
