"""Where the ops go: one file a seam, one table of contents a modality (`text`, `vision`, `audio`)."""
