"""Which rows are one star, and what they say together."""
