"""The jars of Apache Kafka, fetched once by Maven from ``pom.xml`` into the clone's ``build`` folder.

``TEST_KAFKA=3.9.2`` has another version than the pom's.
"""

import fcntl
import os
import re
import shutil
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

HOW_TO_INSTALL: Final = "Java 17 or Maven is not installed: apt-get install default-jre-headless maven"

_POM: Final = Path(__file__).parent / "pom.xml"
_BUILD: Final = Path(__file__).parents[3] / "build"
_OLDEST_JAVA: Final = 17
_LIMIT: Final = 240.0  # seconds


@cache
def is_installed() -> bool:
    """Tell whether there is a Java that runs Kafka, and a Maven to fetch it."""
    java = shutil.which("java")
    if java is None or shutil.which("mvn") is None:
        return False
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    return version is not None and int(version[1]) >= _OLDEST_JAVA


def class_path() -> str:
    """Return Kafka's class path. Any number of processes may ask at once: one fetches, the others wait for it.

    Raises:
        AssertionError: Maven could not fetch it; the message has its last words.
    """
    # Of one pom for ever: another version is another folder.
    version = os.environ.get("TEST_KAFKA", "")
    folder = _BUILD / f"kafka-{version or 'pom'}-{sha256(_POM.read_bytes()).hexdigest()[:12]}"
    _BUILD.mkdir(exist_ok=True)
    with (_BUILD / "kafka.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(folder, [f"-Dkafka.version={version}"] if version else [])
    return f"{folder}/*"


def _fetch(folder: Path, version: list[str]) -> None:
    unfinished = Path(mkdtemp(dir=_BUILD, prefix="kafka-unfinished-"))
    try:
        said = subprocess.run(
            [
                "mvn",
                "-B",
                "-q",
                "-f",
                _POM,
                *_repository(),
                *version,
                "dependency:copy-dependencies",
                f"-DoutputDirectory={unfinished}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_LIMIT,
        )
        assert said.returncode == 0, f"Maven could not fetch Kafka:\n{said.stdout[-2000:]}"
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _repository() -> list[str]:
    """Return where Maven keeps what it downloads: its own place, or the clone where the home cannot be written."""
    try:
        home = Path.home()
    except RuntimeError:  # an account without one
        home = Path("/nonexistent")
    return [] if os.access(home, os.W_OK) else [f"-Dmaven.repo.local={_BUILD / 'maven'}"]
