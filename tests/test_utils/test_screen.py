# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""What the screen shows of what a tool and the toolboxes say; log files keep all of it."""

import itertools
import logging
import warnings

import pytest
from mmengine.logging import MMLogger, print_log

from mmlinglo.utils.screen import quiet_screen

NUMBERS = itertools.count()  # mmengine keeps loggers by name


def record_as(module, logger, message, level=logging.INFO):
    """Log from a function of a module of this name."""
    scope = dict(__name__=module)
    exec('def speak(logger, level, message): logger.log(level, message)', scope)
    scope['speak'](logger, level, message)


@pytest.fixture
def logger_of(tmp_path):
    def build():
        name = f'screen {next(NUMBERS)}'
        return MMLogger.get_instance(name, log_file=str(tmp_path / 'log'), file_mode='w')

    return build


SHOWN = [
    ('mmengine.hooks.logger_hook', 'Epoch(train) [1][16/16]  eta: 0:06:52  loss: 1.5'),
    ('mmlinglo.engine.hooks', 'Epoch(val) [1][3/3]    coco/bbox_mAP: 0.0040'),
    ('mmengine.hooks.checkpoint_hook', 'The best checkpoint with 0.5 score is saved to best.pth.'),
    ('mmdet.evaluation.metrics.coco_metric', '\n Average Precision  (AP) = 0.004'),
    ('mmlinglo.engine.progress_hook', 'RetinaNet, 4.1 M parameters'),
]
HIDDEN = [
    ('mmengine.hooks.logger_hook', 'Epoch(val) [1][50/120]  eta: 0:00:02  time: 0.1'),
    ('mmengine.hooks.logger_hook', 'Exp name: a_20261125'),
    ('mmengine.hooks.checkpoint_hook', 'Saving checkpoint at 1 epochs'),
    ('mmengine.runner.runner', 'Config:\nmodel = dict()'),
    ('mmdet.evaluation.metrics.coco_metric', 'bbox_mAP_copypaste: 0.004 0.014'),
    ('mmdet.evaluation.metrics.coco_metric', 'Evaluating bbox...'),
]


def test_log_records(logger_of, tmp_path, capsys):
    with quiet_screen():
        logger = logger_of()
        for module, message in SHOWN + HIDDEN:
            record_as(module, logger, message)
        record_as('mmengine.runner.runner', logger, 'something is odd', logging.WARNING)
        record_as('mmengine.registry', logger, 'Failed to search registry', logging.WARNING)
        record_as('mmengine.runner.runner', logger, 'something is wrong', logging.ERROR)
    shown, log = capsys.readouterr().out, (tmp_path / 'log').read_text()
    for _, message in SHOWN:
        assert message in shown
    for _, message in HIDDEN:
        assert message not in shown
    assert 'WARNING: something is odd' in shown
    assert 'something is wrong' in shown
    assert 'registry' not in shown
    for _, message in SHOWN + HIDDEN:
        assert message in log
    assert len(shown.splitlines()) == len(SHOWN) + 1 + 2  # a table is two lines


def test_print_log_of_this_package_is_shown(logger_of, capsys):
    with quiet_screen():
        logger = logger_of()
        scope = dict(__name__='mmlinglo.utils.pvtv2', print_log=print_log)
        exec('def speak(logger): print_log("converted", logger)', scope)
        scope['speak'](logger)
        print_log('from elsewhere', logger)
    assert capsys.readouterr().out.endswith(' converted\n')


def test_prints(capsys):
    with quiet_screen():
        print('Could not import OneDL. Skipping OneDL datasets.')
        print('loading annotations into memory...')
        print('Done (t=0.01s)')
        print('a table')
        print('and', 'more')
    assert capsys.readouterr().out == 'a table\nand more\n'


def test_warnings():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with quiet_screen():
            warnings.warn('Warning: The bbox is out of bounds, sorry', UserWarning, stacklevel=1)
            warnings.warn('old', DeprecationWarning, stacklevel=1)
            warnings.warn('your picture is empty', UserWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == ['your picture is empty']
