"""Artifacts, catalogs and stores on disk."""
