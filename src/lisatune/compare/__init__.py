"""Methods side by side."""

from lisatune.compare.results import read_results as read_results
