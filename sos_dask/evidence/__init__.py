"""What is known of a correction: figures, choice, intervals, coverage."""
