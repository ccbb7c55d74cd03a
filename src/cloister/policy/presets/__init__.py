"""What is known about each agent product, as data: one TOML file per preset beside this module.

A preset says where a product keeps its state and its secrets, which variables and hosts it
needs, and how it is told something. It grants nothing by itself: only an agent that names
it gets its hosts. Facts were checked against the version named in each file.
"""

from cloister.policy.presets.catalog import BUILTIN, all_presets, builtin_preset, builtin_presets

__all__ = ["BUILTIN", "all_presets", "builtin_preset", "builtin_presets"]
