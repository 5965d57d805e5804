"""The serving application: `serve run serve.app:app`, or `import_path: serve.app:build` with arguments in a config."""

from ray.serve import Application

from serve.replicas.deployments import application
from serve.settings import ServeSettings


def build(args: ServeSettings) -> Application:
    """Return the application for the `args` of a Serve configuration, which Serve checks against this annotation."""
    return application(args)


# What the environment says where `serve run`, `serve build` or `serve deploy` imports this.
app = application(ServeSettings.from_environment())
