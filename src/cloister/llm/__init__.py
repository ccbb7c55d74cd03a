"""The inference proxy's decisions, sans-I/O: routes, models, usage, prices, budgets, and the rows of the ledger."""
