"""Processes of one run: their start, what they exchange, and how signals end them."""
