"""Spaces of networks: what may be chosen, and how many such networks there are."""
