# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""Find what is wrong with the data of an experiment before you train on it."""

from .check import check_datasets
from .checks import CHECKS
from .report import Finding, Report

__all__ = ['CHECKS', 'Finding', 'Report', 'check_datasets']
