"""The page about a finished training: what its detector gets wrong, and where.

In: an output folder, or results and a dataset. Out: one HTML file that works offline, and JSON.
"""
