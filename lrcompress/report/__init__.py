"""Report of a compression: its data, tables, plots and HTML page."""

from lrcompress.report.record import LayerRecord, PointRecord, Report, SampleText

__all__ = ["LayerRecord", "PointRecord", "Report", "SampleText"]
