"""Write the rows that the quantization-aware trainings of `aware.py` learn from.

    python benchmarks/quality/training_rows.py --articles wiki.train.txt.gz
    --rows wikipedia.jsonl.gz c4.jsonl.gz --output rows.jsonl

The articles of a WikiText file become a row each, the rows of the other files follow them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from deploy.text_data import read_text
from reslora.rows import read_rows

TITLE = re.compile(r"^(?= = [^=].*[^=] = \n)", re.MULTILINE)
"""Before a line such as ` = Robert Boulter = `; sections have more signs."""


def main() -> None:
    """Read, split and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--articles", required=True, help="WikiText training split, raw")
    parser.add_argument("--rows", nargs="*", default=(), help="files of rows with a `text`")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [article for article in TITLE.split(read_text(arguments.articles)) if article.strip()]
    for file in arguments.rows:
        texts += [row.text for row in read_rows(file)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    arguments.output.write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
