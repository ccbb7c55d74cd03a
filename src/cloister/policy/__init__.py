"""What an agent may do: the model, loading it from TOML or JSON, checking it, and presets.

Nothing here knows how a rule is enforced: that is for `plan` and the backends.
"""
