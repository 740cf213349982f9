"""``orchestrator`` and ``python -m orchestrator``: the command line with every sub-command.

Above :mod:`orchestrator.cli` in the layers, so that what builds on the command line can add to it here.
"""

from orchestrator import cli
from orchestrator.demo import demo


def main() -> None:
    """Run the command line and exit."""
    cli.app.command("demo")(demo)
    cli.main()


if __name__ == "__main__":
    main()
