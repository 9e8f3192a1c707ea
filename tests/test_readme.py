"""The README's code runs, and prints what its comments say."""

import contextlib
import io
import json
import re
from pathlib import Path

from rich.console import Console

from bench import report

README = Path(__file__).parent.parent / "README.md"


def test_the_code_blocks_print_what_they_say():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        expected = re.findall(r"print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, namespace)
        assert printed.getvalue().splitlines() == expected


def test_the_error_message_is_the_one_that_comes():
    message = re.search(r"^```text\n(conv: .*)\n```", README.read_text(), flags=re.MULTILINE)[1]
    assert message in (Path(__file__).parent / "test_checks.py").read_text().replace('"\n        "', "")


def test_the_speed_table_is_that_of_the_run_that_it_names():
    text = README.read_text()
    run = json.loads((README.parent / re.search(r"--show (bench/results/\S+\.json)", text)[1]).read_text())
    printed = io.StringIO()
    Console(file=printed, width=240).print(report.brief(run, next(report.present(run))))
    table = [line.rstrip() for line in printed.getvalue().splitlines() if line.strip()]
    assert len(table) > 20
    assert "\n".join(table) in text


def test_pictures_and_pages_that_it_shows_are_there():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text())
    assert len(links) >= 4
    for link in links:
        assert (README.parent / link).exists(), link
