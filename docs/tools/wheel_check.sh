#!/usr/bin/env bash
# Builds the wheel and tries it in an empty environment, from a folder without the checkout: it imports, computes a loss,
# knows its command, and its types pass mypy --strict.
#
#   bash docs/tools/wheel_check.sh PYTHON
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(realpath -s "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

mkdir "$folder/source" # a build writes beside the sources
cp -r "$root"/{pyproject.toml,README.md,LICENSE,fastpref,kernels} "$folder/source"
"$python" -m build --wheel --no-isolation --outdir "$folder" "$folder/source" > "$folder/build.log" 2>&1 ||
    { cat "$folder/build.log" >&2; exit 1; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet install "$(grep ^torch== "$root/constraints.txt")"
"$folder/venv/bin/pip" --quiet install --constraint "$root/constraints.txt" "$folder"/fastpref-*.whl mypy
cd "$folder"
cat > user.py << 'END'
import torch

import fastpref

hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(50, 8)
labels = torch.randint(50, (4, 6))
out: fastpref.PreferenceOutput = fastpref.DPOLoss(beta=0.1).from_hidden(
    hidden, weight, labels, ref_logps=torch.zeros(4)
)
out.loss.backward()  # type: ignore[no-untyped-call]
print("fastpref", fastpref.__version__, "from", fastpref.__file__, "loss", out.loss.item())
END
venv/bin/python user.py
venv/bin/fastpref --help > /dev/null
venv/bin/fastpref validate --quick --op token_logprobs | tail -n 2
venv/bin/mypy --strict user.py
