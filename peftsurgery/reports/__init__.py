"""What an operation returns, and its three faces: table, JSON, HTML."""

from peftsurgery.reports.base import Finding, Level, Progress, Report, Row, Value

__all__ = ["Finding", "Level", "Progress", "Report", "Row", "Value"]
