"""Surveys: their definitions, and the cuts that these name."""
