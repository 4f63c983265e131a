"""The `equipoise` command: its verbs, its global options, and what a failure looks like.

Verbs live in `equipoise.commands`, one file each. Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from copy import copy
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from equipoise import __version__
from equipoise.commands.allocate import allocate_command
from equipoise.commands.audit import audit_command
from equipoise.commands.bench import bench_command
from equipoise.commands.card import card_command
from equipoise.commands.compare import compare_command
from equipoise.commands.convert import convert_command
from equipoise.commands.demo import demo_command
from equipoise.commands.depth import attribute_command
from equipoise.commands.evaluate import evaluate_command
from equipoise.commands.export import export_command
from equipoise.commands.failures import INTERRUPTED, USAGE, explain
from equipoise.commands.generate import generate_command
from equipoise.commands.import_lolcats import import_lolcats_command
from equipoise.commands.lm_eval import PASSED_ON, lm_eval_command
from equipoise.commands.output import say_error, set_debugging
from equipoise.commands.plan import plan_command
from equipoise.commands.push import push_command
from equipoise.commands.recall import recall_command, recall_demo_command
from equipoise.commands.recipes import recipes_command
from equipoise.commands.serve import serve_command
from equipoise.commands.state import state_app
from equipoise.commands.sweep import sweep_command
from equipoise.commands.verify import verify_command
from equipoise.config import ConfigError
from equipoise.distributed import launched, speaks_of_failure

PROGRAM = "equipoise"
_DEBUG = "--debug"


class Verbs(TyperGroup):
    """All verbs, each with --debug; turns what they raise into one short message and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        option: Any = copy(next(parameter for parameter in self.params if parameter.name == "debug"))
        option.expose_value, option.callback = False, _debug_after_verb
        option.hidden = True  # named once, among the global options: a verb's help is one screen
        _give(self.commands, option)

    def resolve_command(self, *args: Any) -> Any:
        """The verb and its arguments.

        Raises:
            ConfigError: one that runs in one process, where several were started.
        """
        found = super().resolve_command(*args)
        _check_ranks(str(found[0]))
        return found

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line: 0 success, 1 the work failed, 2 wrong usage, 130 interrupted."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        arguments = kwargs.get("args") or (args[0] if args else None) or sys.argv[1:]
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except typer.Abort:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # `equipoise recipes | head`: the reader has what it wants
            _close_pipe()
        except Exception as error:
            if _DEBUG in arguments:
                raise
            code, message = explain(error)
            if type(error).__name__ == "NoArgsIsHelpError":  # `equipoise` alone: the message is the help
                typer.echo(message, err=True)
            elif speaks_of_failure(usage=code == USAGE):
                say_error(message)
        sys.exit(code or 0)


def _give(commands: Mapping[str, Any], option: Any) -> None:
    """Let verbs take an option of the whole command too: by habit it comes last."""
    for name, command in commands.items():
        if name != "lm-eval":  # its arguments are not ours
            command.params.append(option)
        _give(getattr(command, "commands", {}), option)


def _debug_after_verb(context: object, parameter: object, wanted: bool) -> None:
    if wanted:  # where not, it may have stood before the verb
        set_debugging(True)


def _close_pipe() -> NoReturn:
    """Leave without Python's own complaint when it flushes stdout on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


app = typer.Typer(
    name=PROGRAM,
    cls=Verbs,
    rich_markup_mode=None,  # help as plain text: it is piped, searched and copied
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit()


RANKED = ("convert", "audit", "evaluate", "lm-eval")
"""Verbs that torchrun may start several times; lm-eval knows launchers of its own."""


def _check_ranks(verb: str) -> None:
    if launched().count > 1 and verb not in RANKED:
        raise ConfigError(
            f"equipoise {verb} runs in one process, but was started in {launched().count}: leave torchrun "
            "out, or unset RANK and WORLD_SIZE."
        )


@app.callback()
def common(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = None,
    debug: Annotated[
        bool, typer.Option(_DEBUG, help="Show tracebacks and the libraries' warnings; also after the verb.")
    ] = False,
) -> None:
    """Convert pretrained transformers into hybrids of window softmax and linear attention, and audit both.

    \b
    equipoise demo --output out/demo
    equipoise convert meta-llama/Llama-3.2-1B --recipe ssd --output out/ssd
    equipoise audit out/ssd --output out/audit
    """
    set_debugging(debug)


VERBS = (
    ("plan", plan_command, "Say what a conversion will take, before it is run."),
    ("allocate", allocate_command, "Measure where a donor needs its state, before it is converted."),
    ("convert", convert_command, "Make a hybrid of a softmax model."),
    ("audit", audit_command, "Show which branch of hybrids does the work."),
    ("attribute", attribute_command, "Show in which layers and heads the branches work."),
    ("import-lolcats", import_lolcats_command, "Make a hybrid of a published LoLCATs checkpoint."),
    ("evaluate", evaluate_command, "Score a model on lm-eval's tasks, in every branch state."),
    ("recall", recall_command, "Ask hybrids for what stands beyond their windows' reach."),
    ("generate", generate_command, "Go on from a prompt, in any branch state."),
    ("serve", serve_command, "Serve a hybrid over OpenAI's API."),
    ("compare", compare_command, "Merge audits of several seeds and recipes."),
    ("sweep", sweep_command, "Convert and audit a whole grid, then compare."),
    ("bench", bench_command, "Time the operators beside what would run instead."),
    ("export", export_command, "Write a converted model whole, or its donor back."),
    ("verify", verify_command, "Hold saved files to their manifest."),
    ("card", card_command, "Write the model card of a converted model."),
    ("push", push_command, "Upload a converted model to the Hub."),
    ("recipes", recipes_command, "List recipes, or show one whole."),
    ("demo", demo_command, "All of it on a small scale, without network or GPU."),
    ("recall-demo", recall_demo_command, "Recall beyond reach on a small scale, likewise."),
)
for _name, _verb, _summary in VERBS:
    app.command(_name, short_help=_summary)(_verb)
app.add_typer(state_app, name="state", short_help="Read a long text once, and go on from it later.")
app.command("lm-eval", short_help="lm-eval's own command line.", context_settings=PASSED_ON)(lm_eval_command)


def main() -> None:
    """Entry point of the `equipoise` command."""
    app(prog_name=PROGRAM)
