"""Servers of other versions than the tests usually run on: this machine's own, or a Debian's in a folder.

`make compat` names versions by ``TEST_POSTGRES=15`` and ``TEST_RABBITMQ=4``; ``scripts/debian.sh`` makes the folders.
A program in a folder runs in a chroot, as the very process that was started: it has our process group and our signals.
Its mounts are its own and vanish with it, however it ends.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FOLDERS: Final = Path(__file__).parents[2] / ".compat"
"""Where ``scripts/debian.sh`` puts them."""

# The folder for temporary files has the same path inside: there tests keep what servers write. Each step is an exec.
_ENTER: Final = """
set -e
root=$1 shared=$2
shift 2
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mkdir -p "$root$shared"
mount --rbind "$shared" "$root$shared"
exec /usr/sbin/chroot "$root" env --chdir="$PWD" PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
"""


@dataclass(frozen=True, slots=True)
class System:
    """A Debian with programs in it: this machine, or a folder that only root can enter."""

    root: Path = Path("/")

    def find(self, program: str, path: str) -> str | None:
        """Return where a program is, as it is called inside; a path is what PATH holds."""
        if self == HERE:
            return shutil.which(program, path=path)
        # A link may lead to where there is something inside only.
        places = [Path(directory) / program for directory in path.split(os.pathsep) if directory.startswith("/")]
        return next((str(place) for place in places if os.path.lexists(self.root / place.relative_to("/"))), None)

    def command(self, *words: str, account: str | None = None) -> list[str]:
        """Return the command that runs a program in here, from a folder for temporary files, as one of its accounts."""
        inside = list(words)
        if account is not None:
            inside = ["setpriv", f"--reuid={account}", f"--regid={account}", "--init-groups", "--", *words]
        if self == HERE:
            return inside
        return ["unshare", "--mount", "--", "sh", "-c", _ENTER, "sh", str(self.root), tempfile.gettempdir(), *inside]

    def user_and_group(self, account: str) -> tuple[int, int]:
        """Return the numbers of an account of its own."""
        for line in (self.root / "etc/passwd").read_text().splitlines():
            name, _, user, group, *_ = line.split(":")
            if name == account:
                return int(user), int(group)
        raise AssertionError(f"there is no account {account} in {self.root}")


HERE: Final = System()


def system_with_rabbitmq(version: str) -> System:
    """Return a system that has a RabbitMQ whose version begins so.

    Raises:
        LookupError: there is none.
    """
    return _first_with(f"usr/lib/rabbitmq/lib/rabbitmq_server-{version}*", f"RabbitMQ {version}")


def system_with_postgres(version: str) -> System:
    """Return a system that has a PostgreSQL of this major version.

    Raises:
        LookupError: there is none.
    """
    return _first_with(f"{postgres_programs(version)}/postgres", f"PostgreSQL {version}")


def postgres_programs(version: str) -> str:
    """Return the directory, relative to the root, where Debian puts the programs of a PostgreSQL."""
    return f"usr/lib/postgresql/{version}/bin"


def _first_with(pattern: str, what: str) -> System:
    for system in (HERE, *(System(finished.parent) for finished in sorted(FOLDERS.glob("*/.packages")))):
        if next(system.root.glob(pattern), None) is not None:
            return system
    raise LookupError(f"no {what} on this machine or in {FOLDERS}; `make compat` puts it there")
