"""Write the service's OpenAPI document: ``python -m stepalign_critic.http.openapi docs/openapi.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stepalign_critic.app import create_app
from stepalign_critic.backends.program import ProgramBackend
from stepalign_critic.service import CriticService


def document() -> str:
    """The committed document: keys in order, a line break at its end. It does not depend on the backend."""
    service = CriticService(ProgramBackend("none", lambda question, attempt: "", "none"), "lab-v1")
    return json.dumps(create_app(service).openapi(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
