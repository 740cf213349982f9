"""Commands of the HTTP API: api, keys."""

from typing import Annotated, Final

import typer

from orchestrator import bootstrap
from orchestrator.cli.output import print_document, print_table, say
from orchestrator.cli.session import AsJson, Reason, actor, session
from orchestrator.domain import Role
from orchestrator.settings import current
from orchestrator.telemetry import configure_logging

app: Final = typer.Typer()
keys: Final = typer.Typer(no_args_is_help=True, help="Make, list and revoke the keys of the HTTP API.")
app.add_typer(keys, name="keys")


@app.command(
    epilog="Example: [bold]orchestrator api --port 8080[/]. Make a key first: [bold]orchestrator keys create me[/]. "
    "Several may run side by side."
)
def api(
    *,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; default: API__HOST.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65_535, help="Port; 0: any that is free; default: API__PORT.")
    ] = None,
) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C."""
    # Not at the top: only this command wants the web framework, which takes longer to import than all the rest.
    from orchestrator.api.server import serve  # noqa: PLC0415 -- see above

    settings = current()
    configure_logging(settings.log)
    try:
        bootstrap.home.open()
        serve(host or settings.api.host, settings.api.port if port is None else port)
    finally:
        bootstrap.home.close()


@keys.command(epilog="Example: [bold]orchestrator keys create 'BFF, production' --role operator --days 365[/]")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; the audit log shows it.")],
    *,
    role: Annotated[Role, typer.Option("--role", help="What it may do; each role may do what those before may.")] = (
        Role.VIEWER
    ),
    days: Annotated[
        float, typer.Option("--days", min=0.001, max=36_500, help="It expires after so many days.")
    ] = 365.0,
    as_json: AsJson = False,
) -> None:
    """Make a key, and show it this once."""
    with session() as ours:
        view, text = ours.ledger.keys.create(name, role, actor=actor(), days=days)
    if as_json:
        print_document({"key": text} | {"id": view.id, "role": view.role, "expires_at": view.expires_at})
        return
    say(f"the key {view.id} of {view.name} ({view.role}); it is shown this once:")
    typer.echo(text)


@keys.command("list", epilog="Example: [bold]orchestrator keys list[/]")
def list_keys(*, as_json: AsJson = False) -> None:
    """List keys, newest first; what they are is not kept."""
    with session() as ours:
        views = ours.ledger.keys.all()
    if as_json:
        print_document({"keys": views})
        return
    rows = [
        (
            view.id,
            view.name,
            view.role,
            "valid" if view.valid else "revoked" if view.revoked_at else "expired",
            view.created_at,
            view.created_by,
            view.expires_at,
            view.used_at,
        )
        for view in views
    ]
    print_table(["key", "name", "role", "", "created", "by", "expires", "last used"], rows)


@keys.command(epilog="Example: [bold]orchestrator keys revoke 5f2c9a01b3d4 --reason 'left the team'[/]")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id, as `keys list` shows it.")],
    *,
    reason: Reason = None,
) -> None:
    """Make a key invalid at once and for good."""
    with session() as ours:
        ours.ledger.keys.revoke(key_id, actor=actor(), reason=reason)
    typer.echo(f"the key {key_id} is revoked")
