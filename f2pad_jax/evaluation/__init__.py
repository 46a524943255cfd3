"""Evaluation on data in MVTec layout: runs, summary, peers, tables, figures and report."""

from f2pad_jax.evaluation import peers
from f2pad_jax.evaluation.cases import ABLATIONS
from f2pad_jax.evaluation.report import write_report
from f2pad_jax.evaluation.runs import evaluate
from f2pad_jax.evaluation.tables import write_tables

__all__ = ["ABLATIONS", "evaluate", "peers", "write_report", "write_tables"]
