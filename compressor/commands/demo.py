"""What `demo.py` does: compress a passage, regenerate it or answer a question about it, and print both."""

from __future__ import annotations

import json
import sys

from compressor.commands.options import DemoConfig
from compressor.commands.shown import show
from compressor.parsing import parse_config
from compressor.streams import check_output, exits_cleanly, shows_example, shows_unicode, write_output


@exits_cleanly
@shows_example("python demo.py --text notes.txt --question 'What is proposed?'")
def demo_main(argv: list[str] | None = None) -> int:
    """Entry point of `demo.py`; returns the exit status."""
    flags = {"json": "print one JSON object instead of text", "web": "open a page in the browser (extra web)"}
    config, options = parse_config(
        DemoConfig, argv, "Compress a passage and regenerate it from its memory.", flags, ["text"]
    )
    if options.web:
        from compressor.commands.web import serve  # needs an extra

        serve(config)
        return 0
    from compressor.commands.demonstration import run_demo  # torch comes with it

    check_output()
    result = run_demo(config)
    shown = json.dumps(result, ensure_ascii=not shows_unicode()) if options.json else show(result, sys.stdout.isatty())
    write_output(shown)
    return 0
