"""Mapping: encode an area once, then score it against any number of queries."""
