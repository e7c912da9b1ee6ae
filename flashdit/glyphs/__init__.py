"""Embedded letters of any size, in matplotlib's fonts, and what scoring makes of them."""
