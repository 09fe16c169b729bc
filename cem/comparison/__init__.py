"""Comparing surrogates at equal budget: the grid of runs, what runs them, and what their results say."""

from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions, Run, Setting
from cem.comparison.report import write_report
from cem.comparison.results import RunResult, read_results
from cem.comparison.runner import run_comparison

__all__ = [
    "Comparison",
    "GridOptions",
    "Run",
    "RunResult",
    "Setting",
    "read_results",
    "run_comparison",
    "write_report",
]
