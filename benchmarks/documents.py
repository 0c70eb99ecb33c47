"""Where a benchmark's document goes: a JSON file for machines, a page for people."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Document = dict[str, Any]


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options for both files."""
    parser.add_argument("--json", type=Path, help="write rows and summary here")
    parser.add_argument("--markdown", type=Path, help="write the page for people here")


def write_json(arguments: argparse.Namespace, document: Document) -> None:
    """Write the file for machines, where one is asked for."""
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=1))


def write_page(
    arguments: argparse.Namespace, document: Document, markdown: Callable[[Document], str]
) -> None:
    """Write the page for people, where one is asked for, and print the summary."""
    if arguments.markdown:
        arguments.markdown.write_text(markdown(document))
    print(json.dumps(document["summary"]))
