"""medfl-ray: the command line. Each noun has a file of its own; nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import sys

import click
import typer

from medfl_ray.cli import cluster, data, models, privacy, receipts, tokens
from medfl_ray.cli.deploy import deploy
from medfl_ray.cli.doctor import doctor
from medfl_ray.cli.evaluate import evaluate
from medfl_ray.cli.export import export
from medfl_ray.cli.predict import predict
from medfl_ray.cli.pretrain import pretrain
from medfl_ray.cli.run import run
from medfl_ray.cli.simulate import simulate
from medfl_ray.cli.tune import tune
from medfl_ray.errors import ConfigError, DataError, MedflError, ModelError, PrivacyConfigError

USER_MISTAKES = (ConfigError, DataError, ModelError, PrivacyConfigError)

app = typer.Typer(
    name="medfl-ray",
    help="Federated learning for medical imaging with patient-level differential privacy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, at once: the library behind the boxes takes longer to load than all the rest
    add_completion=False,
)
app.command()(run)
app.command()(simulate)
app.command()(tune)
app.command()(pretrain)
app.command()(evaluate)
app.command()(export)
app.command()(predict)
app.command()(deploy)
app.command()(doctor)
app.add_typer(data.app, name="data", help="Make, inspect, split and fetch data.")
app.add_typer(models.app, name="models", help="Register, promote, roll back and fetch models; read who did what.")
app.add_typer(tokens.app, name="tokens", help="Make and revoke the tokens of a served model.")
app.add_typer(privacy.app, name="privacy", help="Plan and estimate epsilon; read ledgers.")
app.add_typer(cluster.app, name="cluster", help="Make the token and the certificates of a Ray cluster's nodes.")
app.add_typer(receipts.app, name="receipts", help="Show and verify the signed record of a run's rounds.")


def main() -> None:
    """Run a command; an expected error is one sentence and an exit code: 2 a mistake in the input, 1 anything else."""
    try:
        code = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped; what was published is kept, continue with medfl-ray run --resume", file=sys.stderr)
        sys.exit(130)
    except MedflError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, USER_MISTAKES) else 1)
    except Exception as error:
        if os.environ.get("MEDFL_DEBUG"):
            raise
        print(
            f"unexpected {type(error).__name__}; this is a defect of medfl-ray. Set MEDFL_DEBUG=1 to see where "
            "and report it; a run continues with medfl-ray run --resume.",
            file=sys.stderr,
        )
        sys.exit(70)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
