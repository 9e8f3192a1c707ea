"""The file of facts that the parts write into, each under a name of its own, as soon as it knows something."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """Return what is known so far."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def tell(path: Path, name: str, value: Any) -> None:
    """Add or replace what a part knows. A run that is cut off leaves a whole file behind."""
    known = read(path) | {name: value}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(known, indent=1, default=str) + "\n")
    temporary.replace(path)
