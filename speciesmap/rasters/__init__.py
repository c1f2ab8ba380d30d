"""Rasters: imagery is read, maps are written and embeddings are kept in this room alone."""
