# SPDX-License-Identifier: Apache-2.0
"""`python -m dyads.cli`, where the command `dyads` is not on the path."""

from dyads.cli import main

main(prog_name="dyads")
