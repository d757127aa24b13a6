"""A run's folder, or several, as one page of HTML and its pictures."""

from kdjax.report.command import report as report
