"""The report on a finished training: what the detector gets wrong, and where.

In: an output folder, or detections and a dataset. Out: one offline HTML file, its charts and JSON.
"""
