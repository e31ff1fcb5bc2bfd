"""The record of what happened, and how it is shown."""

from lrcompress.report.record import LayerRecord, PointRecord, Report

__all__ = ["LayerRecord", "PointRecord", "Report"]
