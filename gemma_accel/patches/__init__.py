"""Where the ops go: one file a seam, one table of contents a modality.

The tables of contents are `text`, `vision` and `audio`.
"""
