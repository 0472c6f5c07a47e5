"""The subcommands of `p2d`: each file adds one to the command line, calls public functions and writes what they give."""
