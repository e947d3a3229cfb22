#!/usr/bin/env bash
# One wheel, built without torch, imported and used under several torch releases.
#
#   benchmarks/torch_versions.sh [FOLDER [VERSION ...]]
#
# Not part of the tests: it downloads each torch with all that it needs (gigabytes), into virtual
# environments under FOLDER (default: build/torch_versions). Versions default to the oldest that is
# supported, the pinned one and the newest release.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:-build/torch_versions}")
shift || true
pinned=$(sed -n 's/^torch==//p' requirements/constraints.txt)
versions=("${@:-}")
if [ -z "${versions[0]}" ]; then versions=(2.10.0 "$pinned" newest); fi
python=${PYTHON:-python3}
pip="-m pip --quiet --disable-pip-version-check"

mkdir -p "$folder"
"$python" -m venv "$folder/builder"
rm -f "$folder"/*.whl
"$folder/builder/bin/python" $pip wheel --no-deps --wheel-dir "$folder" .
wheel=$(ls "$folder"/*.whl)
echo "built $(basename "$wheel") in an environment without torch"

for version in "${versions[@]}"; do
  environment="$folder/torch-$version"
  requirement="torch==$version"
  if [ "$version" = newest ]; then requirement=torch; fi
  "$python" -m venv "$environment"
  "$environment/bin/python" $pip install --upgrade "$requirement" numpy
  "$environment/bin/python" $pip install --no-deps --force-reinstall "$wheel"
  (cd "$folder" && "$environment/bin/python" - <<'CHECK'
import warnings

import torch

import ema_fused
from ema_fused import ExponentialMovingAverage, Plan, backends

warnings.simplefilter("error")
torch.manual_seed(0)
averaged = [torch.randn(n) for n in (1, 17, 100_003)]
source = [torch.randn(n) for n in (1, 17, 100_003)]
expected = [tensor.clone() for tensor in averaged]
plan = Plan(averaged, source)
for weight in (0.001, 0.7):
    plan.lerp_(weight)
    torch._foreach_lerp_(expected, source, weight)
source[1].data = torch.ones(17)
plan.lerp_(0.5)
torch._foreach_lerp_(expected, source, 0.5)
assert all(torch.equal(a, e) for a, e in zip(averaged, expected)), "not equal to torch's result"
assert plan.backends == ("cpu",), plan

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
average = ExponentialMovingAverage(model, momentum=0.1)
for _ in range(3):
    model(torch.randn(4, 8)).sum().backward()
    average.update_parameters(model)
missing = backends.native().missing_doors() or "every door into torch is there"
print(f"torch {torch.__version__}: equal to torch to the bit on the native CPU kernel; {missing}")
CHECK
  )
done
