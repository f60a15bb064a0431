# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
import mmlinglo

mmlinglo.require_openmmlab()
from mmlinglo.checkpoint import CheckpointError, load_checkpoint_file, load_model_weights  # noqa: E402

__all__ = ['CheckpointError', 'load_checkpoint_file', 'load_model_weights']
