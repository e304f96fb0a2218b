"""Everything that the commands do, as documented functions in one place.

>>> from sos_dask import api
>>> with api.start(n_workers=2) as cluster:                                  # doctest: +SKIP
...     api.ingest(api.load_survey("lamost-dr11-lrs"), [path], out, cluster=cluster)
...     api.dedupe(api.Catalog.open(out), stars, api.DedupeSettings(), cluster=cluster)
"""

from sos_dask.catalog import Catalog
from sos_dask.cluster import Cluster, start
from sos_dask.config import Job, load_job
from sos_dask.crossmatch import MatchSettings
from sos_dask.dedupe import DedupeSettings
from sos_dask.pipeline import rebuild
from sos_dask.plan import plan
from sos_dask.simulate import SkySettings, simulate
from sos_dask.stages.apply import Trust, apply
from sos_dask.stages.attach import AttachSettings, attach
from sos_dask.stages.compare import CompareSettings, compare
from sos_dask.stages.coverage import CoverageSettings, coverage
from sos_dask.stages.crossmatch import PairSettings, crossmatch
from sos_dask.stages.dedupe import dedupe
from sos_dask.stages.ingest import IngestSettings, ingest
from sos_dask.stages.margin import margin
from sos_dask.stages.reference import ReferenceSettings, reference
from sos_dask.stages.report import ReportSettings, report
from sos_dask.stages.train import TrainSettings, train
from sos_dask.stages.trends import TrendSettings, trends
from sos_dask.stages.uncertainty import UncertaintySettings, uncertainty
from sos_dask.store import gc, status
from sos_dask.survey import Survey
from sos_dask.survey_file import builtin_surveys, load_survey
from sos_dask.unify import UnifySettings
from sos_dask.verify import verify

__all__ = [
    "AttachSettings",
    "Catalog",
    "Cluster",
    "CompareSettings",
    "CoverageSettings",
    "DedupeSettings",
    "IngestSettings",
    "Job",
    "MatchSettings",
    "PairSettings",
    "ReferenceSettings",
    "ReportSettings",
    "SkySettings",
    "Survey",
    "TrainSettings",
    "TrendSettings",
    "Trust",
    "UncertaintySettings",
    "UnifySettings",
    "apply",
    "attach",
    "builtin_surveys",
    "compare",
    "coverage",
    "crossmatch",
    "dedupe",
    "gc",
    "ingest",
    "load_job",
    "load_survey",
    "margin",
    "plan",
    "rebuild",
    "reference",
    "report",
    "simulate",
    "start",
    "status",
    "train",
    "trends",
    "uncertainty",
    "verify",
]
