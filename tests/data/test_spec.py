import subprocess
import sys

import pytest

from dynamize.data import DataSpec
from dynamize.errors import DynamizeError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": "imagefolders:x"}, "did you mean imagefolder:PATH"),
        ({"source": "cifar"}, "use one of imagefolder:PATH"),
        ({"source": "npz:"}, "write npz:PATH"),
        ({"source": "torchvision:CIFAR10"}, "write torchvision:NAME@ROOT"),
        ({"source": "digits:3"}, "write 'digits'"),
        ({"source": "digits", "fold": 2}, "use 0 to 1"),
        ({"source": "digits", "normalize": [[0.5], [0.5, 0.5]]}, "one of each per channel"),
        ({"source": "digits", "normalize": [[125.0], [60.0]]}, "divide values meant for 0..255"),
        ({"source": "digits", "calibration": 1.5}, "less than 1"),
        ({"source": "digits", "calibration": 0}, "greater than or equal to 1"),
        ({"source": "digits", "augmentation": "none"}, "Did you mean augment"),
    ],
)
def test_what_a_spec_refuses(given, said):
    with pytest.raises(DynamizeError, match=said.replace("(", r"\(")):
        DataSpec(**given)


def test_counts_and_shares_stay_what_they_are():
    assert DataSpec(source="digits", calibration=100).calibration == 100
    assert DataSpec(source="digits", calibration=0.25).calibration == 0.25
    spec = DataSpec(source="npz:a.npz", normalize=[[0.5], [0.25]])
    assert DataSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_spec_is_checked_without_torch():
    code = "import sys; from dynamize.data import DataSpec; DataSpec(source='digits'); "
    code += "print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
