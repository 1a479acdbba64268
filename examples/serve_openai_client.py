# SPDX-License-Identifier: Apache-2.0
"""Train, serve and ask with OpenAI's client: `python examples/serve_openai_client.py RECIPE.yaml OUT`.

The server of this example runs until its answers are printed. Otherwise: `dyads train RECIPE.yaml --out OUT`, then
`dyads serve OUT`, and any client of OpenAI's protocol (`pip install 'dyads[serve]' openai`).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from openai import OpenAI

recipe, out = sys.argv[1:]
dyads = [sys.executable, "-m", "dyads.cli"]
if not Path(out).exists():
    subprocess.run([*dyads, "train", recipe, "--out", out], check=True)

server = subprocess.Popen([*dyads, "serve", out, "--port", "0"], stdout=subprocess.PIPE, text=True)
assert server.stdout is not None
try:
    address = next(line.split(" models at ")[1].split()[0] for line in server.stdout if " models at " in line)
    client = OpenAI(base_url=address, api_key="none")  # a server without --api-keys takes any
    tasks = [model.id for model in client.models.list() if "/" in model.id and model.id.startswith(Path(out).name)]
    for task in tasks:
        # The model's name chooses the task, whose form the input is put into.
        answer = client.chat.completions.create(model=task, messages=[{"role": "user", "content": "river fox lamp"}])
        print(f"{task}: {answer.choices[0].message.content}")
    stream = client.chat.completions.create(
        model=tasks[0],
        messages=[{"role": "user", "content": "river fox lamp"}],
        temperature=0.8,
        seed=1,
        stream=True,
    )
    print(f"{tasks[0]}, drawn: {''.join(chunk.choices[0].delta.content or '' for chunk in stream)}")
finally:
    server.terminate()  # answers that run may end first
    server.wait()
