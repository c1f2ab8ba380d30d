"""Observations: reading, cleaning, background and spatial folds."""
