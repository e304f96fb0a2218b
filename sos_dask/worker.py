"""What our own worker processes import before anything else."""

from sos_dask.machine import leave_pandas_out

leave_pandas_out()
