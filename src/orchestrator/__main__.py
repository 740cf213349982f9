"""``orchestrator`` and ``python -m orchestrator``: the command line with every sub-command.

Above :mod:`orchestrator.cli` in the layers, so that what builds on the command line can add to it here.
"""

import gc

# Imports make many objects and no garbage, for which the collector would look a fifth of the time that they take.
gc.disable()

from orchestrator import cli  # noqa: E402 -- see above
from orchestrator.demo import demo  # noqa: E402 -- see above

gc.enable()


def main() -> None:
    """Run the command line and exit."""
    cli.app.command("demo")(demo)
    cli.main()


if __name__ == "__main__":
    main()
