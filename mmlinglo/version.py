# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The one place that holds the version; setup.py reads it as text."""

__version__ = '0.1.0'
