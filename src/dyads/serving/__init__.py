# SPDX-License-Identifier: Apache-2.0
"""Server: the models of runs behind an HTTP endpoint that speaks OpenAI's protocol (`dyads serve`)."""
