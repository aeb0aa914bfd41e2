"""Compress a passage into a few memory tokens and regenerate it from them.

python demo.py                                  an unseen arXiv abstract, offline, with the bundled model
python demo.py --example published              the example of the 500xCompressor paper, with its question
python demo.py --text notes.txt --tokens 4      your own text
python demo.py --question "What is proposed?"    an answer from the memory, beside those from the whole passage and none
python demo.py --web                            a page to try texts and questions on
cat notes.txt | python demo.py --text - --json  one JSON object
"""

import sys

from compressor.commands.cli import demo_main

if __name__ == "__main__":
    sys.exit(demo_main())
