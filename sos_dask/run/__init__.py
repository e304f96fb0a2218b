"""Where tasks run: the cluster, and this machine."""
