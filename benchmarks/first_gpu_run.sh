#!/bin/sh
# The first checks on a GPU, and the time of one layer there; at most eight minutes. From the top of the repository:
#   sh benchmarks/first_gpu_run.sh            needs a Python with dyads and pytest (PYTHON=…, or .venv of `make test`)
set -u
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1 PYTHONPATH="src:tests${PYTHONPATH:+:$PYTHONPATH}"

"$PYTHON" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.version.cuda)' || exit 1
timeout 300 "$PYTHON" -m pytest tests/test_cuda.py -p no:cacheprovider --tb=short -rfE
checks=$?
timeout 180 "$PYTHON" -m benchmarks.on_gpu || exit 1
exit "$checks"
