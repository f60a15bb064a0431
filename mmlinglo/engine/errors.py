# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.


class TrainingError(RuntimeError):
    """An error that ends a training. Its message tells the user what to do."""
