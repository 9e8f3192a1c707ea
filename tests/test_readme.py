"""The README's code runs, and prints what its comments say."""

import contextlib
import io
import re
from pathlib import Path

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
