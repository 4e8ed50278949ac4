"""Transforms that a user writes: found wherever they stand, run only if trusted, asked for where they are missing.

Where one is imported, in a process of its own, as a class that is written once is registered until the process ends.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import call, process
from ledgers import TINY

import dynamize as dz
from dynamize.recipe import load_recipe
from dynamize.recipes import read_recipe

OWN = '''
from abc import ABC
from pathlib import Path
from typing import Literal

from pydantic import Field

from dynamize.transform import Kind
from dynamize.transforms import Exits

Path("ran").touch()


class Late(Exits, ABC):
    """Derived from a transform, and itself none: its name is that of its base."""


class LateExit(Late):
    """One exit late in the network."""

    pass_name: Literal["late_exit"] = Field("late_exit", alias="pass")
    at: list[str] = ["layer3.0"]
    late: int = Field(1, description="how late")
'''


def fresh(code: str, folder: Path) -> str:
    """What a new process prints that runs ``code``."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(code: str, folder: Path) -> str:
    """The DynamizeError that the last line of ``code`` raises in a new process."""
    *before, last = code.strip().splitlines()
    asked = ["import dynamize as dz", *before, "try:", f"    {last}", "except dz.DynamizeError as error:"]
    told = fresh("\n".join([*asked, "    print(error)"]), folder)
    assert told
    return told


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe `digits_exits` with an exit of the user's own, in a folder beside that of the process."""
    plain: dict[str, Any] = read_recipe("digits_exits") | {"code": ["steps/own.py"]}
    plain["steps"] = [{"pass": "late_exit"}]
    (tmp_path / "recipes" / "steps").mkdir(parents=True)
    (tmp_path / "recipes" / "steps" / "own.py").write_text(OWN)
    file = tmp_path / "recipes" / "own.yaml"
    file.write_text(yaml.safe_dump(plain))
    return file


def install(entry_point: str, folder: Path) -> None:
    info = folder / "own_steps-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-steps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[dynamize.transforms]\n{entry_point}\n")


def test_a_class_is_registered_by_being_written_and_by_its_package_being_installed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    install("late = own:LateExit", tmp_path)
    code = """
import sys
from dynamize.transform import registered
assert "late_exit" in registered() and "own" in sys.modules
import own
from abc import abstractmethod
from dynamize.cli import app
from dynamize.recipe import Recipe, schema
from dynamize.transform import Applied, Transform, parse_step, registered
from dynamize.transforms import Exits

class Half(Transform):
    pass_name: own.Literal["half"] = own.Field("half", alias="pass")
    @abstractmethod
    def more(self): ...
    def apply(self, network, context): return Applied(network, self)

known = registered()
assert known["late_exit"] is own.LateExit and known["exits"] is Exits and "half" not in known
assert parse_step({"pass": "late_exit", "late": 2}) == own.LateExit(late=2)
model, data = {"source": "dynamize:digits_resnet", "input": [1, 8, 8]}, {"source": "digits"}
steps = [{"pass": "late_exit"}, {"pass": "calibrate"}]
recipe = Recipe.model_validate({"version": 1, "model": model, "data": data, "steps": steps})
assert type(recipe.transforms()[0]) is own.LateExit
assert recipe.model_dump(mode="json", by_alias=True)["steps"][0]["late"] == 1
assert schema()["$defs"]["LateExit"]["properties"]["late"]["description"] == "how late"
app(["transforms", "late_exit"])
"""
    assert "how late" in fresh(code, tmp_path)


@pytest.mark.slow
def test_a_class_written_again_counts_and_another_of_its_name_does_not(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    code = """
import importlib, own
from dynamize.transform import registered
first = own.LateExit
importlib.reload(own)
assert registered()["late_exit"] is own.LateExit is not first
class Other(own.Exits):
    pass_name: own.Literal["late_exit"] = own.Field("late_exit", alias="pass")
registered()
"""
    told = refusal(code, tmp_path)
    assert told.startswith("two transforms are called `late_exit`: own.LateExit and __main__.Other: give one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ['str = "mine"', 'str = Field("mine", alias="pass")', 'Literal["mine"] = "mine"'])
def test_a_name_that_no_recipe_could_give(name: str, tmp_path: Path) -> None:
    code = f"""
from typing import Literal
from pydantic import Field
from dynamize.transform import registered
from dynamize.transforms import Exits
class Mine(Exits): pass_name: {name}
registered()
"""
    assert 'write `pass_name: Literal["mine"] = Field("mine", alias="pass")`' in refusal(code, tmp_path)


@pytest.mark.slow
def test_an_installed_package_that_cannot_be_imported(tmp_path: Path) -> None:
    install("late = owl", tmp_path)
    told = refusal("from dynamize.transform import registered\nregistered()", tmp_path)
    assert "the entry point late = owl of own-steps failed with ModuleNotFoundError" in told


def test_code_beside_a_recipe_is_not_run_unasked(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = call("run", recipe, "--out", "out", "--model=dynamize:digits_resnet")
    assert refused.exit_code == 2
    assert "steps/own.py" in refused.stderr
    assert "--trust-code" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_a_recipe_with_code_and_what_it_makes(recipe: Path, tmp_path: Path) -> None:
    out, untrained = tmp_path / "out", [one for one in TINY if not one.startswith("--set=steps")]
    quick = [*untrained, "--set=data.test_limit=100", "--set=backends=[eager]", "--quiet"]
    ran = process("run", recipe, "--out", out, "--trust-code", *quick, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (tmp_path / "ran").unlink()
    recipe.with_name("steps").rename(tmp_path / "gone")
    with pytest.raises(dz.DynamizeError, match="needs the code of the transform `late_exit`, which is not h") as caught:
        dz.load(out)
    told = f"read {out / 'code' / 'own.py'}, then add --trust-code (in Python: trust_code=True)"
    assert told in str(caught.value)
    assert not (tmp_path / "ran").exists()
    trusted = f"import dynamize as dz\nprint(dz.load({str(out)!r}, trust_code=True).exit_count)"
    assert fresh(trusted, tmp_path) == "2\n"
    (out / "code" / "own.py").unlink()
    with pytest.raises(dz.DynamizeError, match="Import the module that defines it before loading"):
        dz.load(out, trust_code=True)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (["nowhere.py"], "code: there is no file nowhere.py beside the recipe"),
        (["steps/own.py", "own.py"], "two of these have one name"),
        (["broken.py"], "broken.py failed with ZeroDivisionError"),
    ],
)
def test_code_that_cannot_be_run(code: list[str], told: str, recipe: Path, tmp_path: Path) -> None:
    (recipe.parent / "own.py").write_text(OWN)
    (recipe.parent / "broken.py").write_text("1 / 0")
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"code": code}))
    with pytest.raises(dz.DynamizeError, match=told):
        load_recipe(recipe, trust_code=True)
