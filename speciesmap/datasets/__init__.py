"""Paired data sets on disk: ground photos and aerial windows of the same places."""
