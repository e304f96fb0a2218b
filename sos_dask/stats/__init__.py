"""Numbers that are counted once for all rooms."""
