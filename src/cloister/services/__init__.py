"""One main() per daemon. Here: the per-user broker."""
