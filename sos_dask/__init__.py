"""Put stellar spectroscopic surveys on one scale: out of core, exact on the sky, restartable."""

__version__ = "0.1.0"
