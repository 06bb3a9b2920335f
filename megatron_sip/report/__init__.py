"""The run report: one self-contained HTML page about a run, or about several side by side."""

from megatron_sip.report.page import write_report

__all__ = ["write_report"]
