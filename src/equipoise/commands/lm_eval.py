"""`equipoise lm-eval`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from equipoise.commands.evaluate import needs_lm_eval
from equipoise.commands.failures import FAILED, VerbError, explain
from equipoise.commands.output import progress, say

PASSED_ON: dict[str, Any] = {
    "ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": [],
}  # fmt: skip
"""Typer's settings for a verb whose options are another program's, --help included."""
_OURS = (
    "equipoise's models: --model equipoise --model_args pretrained=DIR,branch=window,reading=literal\n"
    "(branches: both, window, linear, none, sinks, softmax, softmax_lora)"
)


def lm_eval_command(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="…", help="lm-eval's own.")] = None,
) -> None:
    """Run lm-eval's own command line, which then knows `--model equipoise`.

    \b
    equipoise lm-eval run --model equipoise --model_args pretrained=out/ssd,branch=window --tasks gsm8k
    """
    with needs_lm_eval():
        from equipoise.evaluate.harness import command_line
    given = list(arguments or ())
    if not given or {"-h", "--help"} & set(given):
        say(progress(), _OURS)
    try:
        command_line(given)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        code, message = explain(error)
        words = str(error).strip() if code == FAILED else message
        raise VerbError(f"lm-eval: {words or type(error).__name__}", code) from error
