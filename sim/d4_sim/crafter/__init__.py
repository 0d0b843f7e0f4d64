"""Crafter: a survival game in two dimensions, from collecting wood to a diamond, as a world of d4."""
