"""Evaluation: a model beside simpler ways to make the same map, and as a search engine."""
