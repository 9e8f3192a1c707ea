"""Conformance of a kernel to an op: calls are drawn, each is made in several ways, and what fails is made small.

`cases` draws calls; `libraries` hands arrays to a kernel and looks after memory; `trial` makes the calls of one case;
`dialects` speaks the conventions of other libraries; `conformance` runs it all and reports.
"""

from .conformance import ConformanceReport, Failure, conformance

__all__ = ["ConformanceReport", "Failure", "conformance"]
