"""What is imported when, and what a missing package is called."""

import re
import subprocess
import sys

import pytest
from launch import ROOT, environment

HEAVY = [
    "transformers", "timm", "datasets", "evaluate", "accelerate", "torchvision", "sklearn", "scipy", "matplotlib",
    "huggingface_hub",
]  # fmt: skip
REGISTERED = """
import transformers.trainer_optimizer as handlers, transformers.training_args as arguments
print(arguments.OptimizerNames("powergrad_adamw") in handlers._OPTIMIZER_HANDLERS)
"""


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_the_transform_needs_torch_alone():
    light = "pgt_hf, pgt_hf.functional, pgt_hf.loss, pgt_hf.logits, pgt_hf.attach, pgt_hf.images"
    assert python(f"import sys, {light}; print([m for m in {HEAVY} if m in sys.modules])") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        pytest.param("import pgt_hf", marks=pytest.mark.long),
        pytest.param("import pgt_hf\nfrom transformers import TrainingArguments", marks=pytest.mark.long),
        pytest.param("import pgt_hf\nfrom transformers import Trainer", marks=pytest.mark.long),
        pytest.param("from transformers import TrainingArguments\nimport pgt_hf", marks=pytest.mark.long),
        "from transformers import Trainer\nimport pgt_hf",
        pytest.param("import transformers.trainer_optimizer\nimport pgt_hf", marks=pytest.mark.long),
        pytest.param("from pgt_hf.trainer import parse_optim_args", marks=pytest.mark.long),
        pytest.param("from pgt_hf.trainer.registration import register", marks=pytest.mark.long),
        "from pgt_hf import PowerGradTrainer",
    ],
)
def test_optimizers_are_registered_whatever_is_imported_first(program):
    assert python(program + REGISTERED) == "True"


@pytest.mark.slow
def test_every_exported_name_is_there():
    wings = ["pgt_hf", *(f"pgt_hf.{wing}" for wing in ("trainer", "images", "analysis", "runs", "hub"))]
    told = python("\n".join(f"from {wing} import *\nimport {wing} as w\nprint(len(w.__all__) > 3)" for wing in wings))
    assert told.split() == ["True"] * len(wings)


def test_what_users_read_imports_nothing_deeper_than_a_wing():
    files = [ROOT / "README.md", *(path for folder in ("docs", "recipes") for path in (ROOT / folder).rglob("*.*"))]
    texts = {path: path.read_text("utf-8") for path in files if path.suffix in (".py", ".md", ".ipynb")}
    assert len(texts) > 20
    deep = {path.name: re.findall(r"(?:from|import) pgt_hf\.\w+\.\w+", text) for path, text in texts.items()}
    assert {name: found for name, found in deep.items() if found} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("datasets", "images.num_images", "pgt_hf.images.num_images needs datasets: pip install 'pgt_hf[images]'"),
        ("optuna", "trainer.run_trials", "pgt_hf.trainer.run_trials needs optuna: pip install 'pgt_hf[search]'"),
        ("huggingface_hub", "hub.push_release", "pip install 'pgt_hf[hub]'"),
        ("datasets", "text.load_plain_text", "pgt_hf.text needs datasets: pip install 'pgt_hf[text]'"),
    ],
)
def test_missing_package_is_an_error_that_names_the_extra(package, name, message):
    wing, _, name = name.partition(".")
    told = python(f"""
import sys
class Missing:  # as if the package were not installed
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
if {package!r} == "huggingface_hub":
    import transformers  # which needs it as well
    for module in [module for module in sys.modules if module.partition(".")[0] == {package!r}]:
        del sys.modules[module]
sys.meta_path.insert(0, Missing())
try:
    import pgt_hf.{wing}
    pgt_hf.{wing}.{name}
except ImportError as error:
    print(error)
""")
    assert message in told


@pytest.mark.slow
def test_without_any_optional_package_every_name_is_there_or_names_its_extra():
    told = python("""
import sys
from importlib import import_module
OPTIONAL = "datasets evaluate matplotlib optuna peft pyarrow scipy sklearn sqlalchemy".split()
find = sys.meta_path[-1].find_spec
def find_spec(name, *where):
    return None if name.partition(".")[0] in OPTIONAL else find(name, *where)
sys.meta_path[-1].find_spec = staticmethod(find_spec)
for wing in ("pgt_hf", "pgt_hf.trainer", "pgt_hf.images", "pgt_hf.analysis", "pgt_hf.runs", "pgt_hf.hub"):
    for name in import_module(wing).__all__:
        try:
            getattr(import_module(wing), name)
        except ImportError as error:
            if f"{wing}.{name} needs" not in str(error) or "pip install 'pgt_hf[" not in str(error):
                print(wing, name, repr(error))
import pgt_hf.analysis
pgt_hf.ImageTrainer, pgt_hf.analysis.ClassificationMetrics  # for data of one's own, without `datasets`
""")
    assert told == ""


def test_unknown_name_is_an_attribute_error():
    import pgt_hf

    with pytest.raises(AttributeError, match="module 'pgt_hf' has no attribute 'powergrad_magic'"):
        pgt_hf.powergrad_magic  # noqa: B018
