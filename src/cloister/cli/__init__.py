"""The front door: one file per verb, each a thin edge over `runs`."""
