# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What is wrong with the data of an experiment, before it is trained on."""

from .check import check_datasets
from .report import CHECKS, Finding, Report

__all__ = ['CHECKS', 'Finding', 'Report', 'check_datasets']
