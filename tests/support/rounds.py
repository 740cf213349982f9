"""How much of a randomised test is done, and its seed: a little in ``make test``, a lot in ``make faults``."""

import os
from typing import Final

LONG: Final = os.environ.get("FAULTS") == "long"
"""Whether this is `make faults`; in `make test` every fault has a short version."""

SEED: Final = int(os.environ.get("FAULT_SEED", "20261123"))


def rounds(few: int, many: int) -> range:
    """Return the rounds of a fault: a few in `make test`, many in `make faults`."""
    return range(many if LONG else few)
