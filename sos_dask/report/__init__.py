"""Report: figures and one page that a person can look at. Tables and counts in, bytes out."""
