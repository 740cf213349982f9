"""The HTTP API: what the command line can do, for programs, by the conventions of the web.

FastAPI over the same services as everything else. Handlers are plain functions in a pool of threads, as all of this
package is synchronous; a request is answered once its effect is committed, and workers are woken afterwards
(``waker``). Deliberately unknown here: SQL, state changes, how runs are worked on.

``app`` puts it together; ``security`` says who may ask, ``problems`` how is answered what cannot be done, ``requests``
how a change is done once, ``pages`` how long lists are cut; ``runs``, ``schedules`` and ``operations`` have the routes,
and ``schemas`` their documents.
"""

from orchestrator.api.app import create_app

__all__ = ["create_app"]
