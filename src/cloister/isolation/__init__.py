"""Backends: each turns a policy into the steps of one strength of isolation. Pure: nothing here runs anything."""
