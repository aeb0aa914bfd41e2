"""`demo.py`: compress a passage, regenerate it or answer a question about it, and print both; or serve a page."""

from __future__ import annotations

import json
import sys
from typing import Any

from compressor.commands.demonstration import run_demo
from compressor.commands.options import DemoConfig
from compressor.commands.shown import show
from compressor.errors import lacking
from compressor.streams import check_output, shows_unicode, write_output


def run(config: DemoConfig, switches: Any) -> None:
    """Print what comes back, or serve the page."""
    if switches.web:
        try:
            from compressor.commands.web import serve  # optional: gradio
        except ModuleNotFoundError as error:
            raise lacking("the page", error.name or "gradio", "web") from None
        serve(config)
        return
    check_output()
    found = run_demo(config)
    write_output(
        json.dumps(found, ensure_ascii=not shows_unicode()) if switches.json else show(found, sys.stdout.isatty())
    )
