"""Anchors, tiles and evaluation for small objects."""
