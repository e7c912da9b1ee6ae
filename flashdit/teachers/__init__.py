"""Frozen networks from which a model learns besides its data."""
