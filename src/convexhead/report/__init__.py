"""Tables, figures and one self-contained HTML page from a plain dictionary of results."""

from convexhead.report import methods
from convexhead.report.page import render
from convexhead.report.tables import csv_rows, markdown_table, terminal_table

__all__ = ["csv_rows", "markdown_table", "methods", "render", "terminal_table"]
