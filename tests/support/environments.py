"""Throw-away virtual environments for what must not share ours: plain clients, and peers to measure against."""

import subprocess
import sys
from pathlib import Path
from typing import Final

CLIENTS: Final = Path(__file__).parent / "clients"
"""The scripts that run in them, and the locks that they are made from."""


def make_environment(home: Path, lock: str) -> Path:
    """Make a virtual environment of exactly what a lock of :data:`CLIENTS` names; return its interpreter."""
    uv = Path(sys.executable).with_name("uv")
    python = home / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--no-project", "--python", sys.executable, home], check=True)
    command: list[str | Path] = [
        uv,
        "pip",
        "install",
        "--quiet",
        "--compile-bytecode",
        "--python",
        python,
        "--require-hashes",
    ]
    subprocess.run([*command, "-r", CLIENTS / f"{lock}.lock"], check=True, timeout=120)
    return python
