"""What our own worker processes import before anything else."""

from sos_dask.run.machine import keep_freed_memory, leave_pandas_out

keep_freed_memory()
leave_pandas_out()
