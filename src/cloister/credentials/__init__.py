"""Secrets an agent uses without holding them: references, placeholders, and what is injected where. Values only."""
