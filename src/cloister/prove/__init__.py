"""The attack battery: cases, and the runner that tries them against an agent's own sandbox."""
