"""Slow and literal versions of the fast paths, one client at a time."""
