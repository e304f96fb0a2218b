"""The nightly rebuild as an Airflow DAG. A try that was killed goes on where it was."""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "sos_dask_rebuild",
    schedule="30 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="rebuild",
        bash_command="sos-dask rebuild /srv/sos-dask/job.toml",
        skip_on_exit_code=11,  # another rebuild is at work
        retries=2,
        retry_delay=timedelta(minutes=10),
        execution_timeout=timedelta(hours=12),
    )
