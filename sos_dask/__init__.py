"""Put stellar spectroscopic surveys on one scale: out of core, exact on the sky, restartable."""

import os

# Threads that wait for each other sleep: on a busy machine they would burn what the others need.
# OpenMP reads it when it is loaded, with XGBoost or scikit-learn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
