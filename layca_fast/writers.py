"""Where rotation curves go: the public path of ``monitor/writers.py``."""

from .monitor.writers import CsvWriter, JsonLinesWriter, TensorBoardWriter, Writer

__all__ = ["CsvWriter", "JsonLinesWriter", "TensorBoardWriter", "Writer"]
