"""Slow, obvious rewrites, and tables of other programs' names: what the fast code is held against."""
