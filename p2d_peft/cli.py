"""The command `p2d`; what its subcommands do is in `commands/`."""

from __future__ import annotations

import argparse
import sys

from .commands import export, heads, report, select
from .commands.output import OneLineParser, error_line, output_as_wanted
from .version import __version__


_QUIET_FLAG = "--quiet"
_QUIET = "print nothing but warnings and errors"


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(prog="p2d", description="From Parameters to Data, step by step and in one.")
    parser.add_argument("--version", action="version", version=f"p2d_peft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.add_argument(_QUIET_FLAG, action="store_true", help=_QUIET)
    commands = parser.add_subparsers(dest="command", required=True)
    # TRL's parser, which has some hundred options, takes over what follows
    commands.add_parser(
        "sft", help="localize, select and train, as `trl sft` trains", add_help=False, allow_abbrev=False
    )
    for command in (heads, select, export, report):
        command.add_parser(commands)
    # behind the command, too, where it is looked for; `--debug` is an option of Trainer's there
    for command_parser in commands.choices.values():
        command_parser.add_argument(_QUIET_FLAG, action="store_true", default=argparse.SUPPRESS, help=_QUIET)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command line.

    Returns:
        `int`: 0; 2 after an error, of which one line is printed; or 130 after Ctrl-C, as shells have it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown and args.command != "sft":
        parser.prog += f" {args.command}"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        # a report is all that `p2d report` is asked for
        with output_as_wanted(args.quiet and args.command != "report", args.debug):
            if args.command == "sft":
                from .commands import sft

                place = arguments.index("sft")
                of_p2d = [*arguments[:place], *([_QUIET_FLAG] if args.quiet else [])]
                sft.run([word for word in arguments[place + 1 :] if word != _QUIET_FLAG], of_p2d)
            else:
                args.run(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        # what is kept was told where it is known
        print(f"p2d {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"p2d {args.command}: {error_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
