#!/usr/bin/env python3
"""Write docs/openapi.json, what the HTTP API says of itself; a test fails where it is out of date.

python -m scripts.openapi
"""

import json
from pathlib import Path
from typing import Final

from orchestrator import bootstrap
from orchestrator.api import create_app

PAGE: Final = Path(__file__).parents[1] / "docs/openapi.json"


def document() -> str:
    """Return the document as it stands in the repository."""
    return json.dumps(create_app(bootstrap.services()).openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(document())
