"""Where tasks run: the cluster, and this machine."""

# Stages whose tasks spend nearly all their time in compiled code, so that threads can do them. On
# two cores worker processes take a second to start, which is a third of a whole crossmatch of
# 19 million rows.
LIGHT = ("ingest", "dedupe", "reference", "crossmatch", "apply")
