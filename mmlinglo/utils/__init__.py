# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
from mmlinglo.checkpoint import CheckpointError, load_checkpoint_file, load_model_weights

__all__ = ['CheckpointError', 'load_checkpoint_file', 'load_model_weights']
