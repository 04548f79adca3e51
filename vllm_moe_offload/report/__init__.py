"""What every worker says of itself once a second, in files that other processes of its user read.

It must never make a step wait, nor say anything of what requests say: no text, no token ids.
"""

from .files import ReportFile, read_reports, reports_folder
from .report import ExpertMap, Histogram, Prediction, RequestReport, Residency, Role, WorkerReport

__all__ = [
    "ExpertMap",
    "Histogram",
    "Prediction",
    "ReportFile",
    "RequestReport",
    "Residency",
    "Role",
    "WorkerReport",
    "read_reports",
    "reports_folder",
]
