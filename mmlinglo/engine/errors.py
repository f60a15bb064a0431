# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.


class TrainingError(RuntimeError):
    """Something that ends a training and is explained in the message."""
