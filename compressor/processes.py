"""Starting the processes of a run: one, or several under `accelerate launch`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

LONGEST_WAIT = timedelta(hours=6)
"""How long processes wait for the main one, which tokenises and packs alone."""


def make_accelerator(**options: Any) -> Accelerator:
    """An `Accelerator` with these options; quiet on all processes but the main one.

    On a machine without accelerators, processes that were started together would each work alone unless told that they
    are on CPUs.
    """
    together = int(os.environ.get("WORLD_SIZE", 1)) > 1
    accelerator = Accelerator(
        cpu=together and not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        **options,
    )
    if not accelerator.is_main_process:
        # One process speaks; a library's warnings would come once for each.
        logging.disable(logging.WARNING)
    return accelerator


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Keep the progress bars of the loading layer and of transformers out of log files."""
    import datasets
    from transformers.utils import logging as transformers_logging

    if sys.stderr.isatty():
        yield
        return
    before = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before[0]:
            datasets.enable_progress_bars()
        if before[1]:
            transformers_logging.enable_progress_bar()
