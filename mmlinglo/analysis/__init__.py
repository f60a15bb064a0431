# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
