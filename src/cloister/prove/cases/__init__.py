"""The cases: one attack per file, with a header the host reads as text. They run in the sandbox only."""
