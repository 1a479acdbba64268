# SPDX-License-Identifier: Apache-2.0
"""Entry point `python -m dyads`, for an environment whose `dyads` command is not on the path."""

from dyads.cli import main

main(prog_name="dyads")
