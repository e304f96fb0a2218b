"""A whole job: its file, its plan, and the run that publishes."""
