"""Rules of the house that no single module can keep alone."""

import ast
import importlib
import inspect
import re
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import cem
from cem.attacks import ATTACKS
from cem.models import SplitModel
from cem.training import injection, weighted

ROOT = Path(__file__).parent.parent
TEXTS = {path: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("cem*/**/*.py"))}
TREES = {path: ast.parse(text) for path, text in TEXTS.items()}
KERNELS = [path for path in TEXTS if path.match("cem_kernels/*/kernels*.py")]
OPERATORS = [ROOT / "cem_kernels" / name for name in ("slot_attention", "slot_variance", "cross_attention", "variance")]


def nodes(kind, under="", only="*"):
    """Nodes of the syntax trees of files whose path begins and whose name reads so, with their files."""
    files = [path for path in TREES if path.is_relative_to(ROOT / under) and path.match(only)]
    return [(path, node) for path in files for node in ast.walk(TREES[path]) if isinstance(node, kind)]


def test_trainer_attacks_comparison_and_report_name_no_member():
    members = [*(cem.SURROGATES[name] for name in cem.SURROGATES), *(cem.DEFENSES[name] for name in cem.DEFENSES)]
    names = {name for each in members for name in (each.name, each.__name__)} - {"none", "noise"} | {"gmm"}
    blind = [path for name in ("training", "attacks", "comparison", "report") for path in ROOT.glob(f"cem/{name}/*.*")]
    blind += [ROOT / "cem" / f"{name}.py" for name in ("train", "attack", "compare")]
    named = {path: re.findall(rf"\b({'|'.join(names)})\b", path.read_text(encoding="utf-8")) for path in blind}
    assert len(named) > 20
    assert not {path: found for path, found in named.items() if found}


def test_no_attack_is_named_outside_its_file_the_registry_and_attacks_that_start_from_it():
    members = {name: ATTACKS[name] for name in ATTACKS}
    homes = {Path(inspect.getfile(each)).resolve() for each in members.values()} | {ROOT / "cem/attacks/__init__.py"}
    quoted = re.compile(rf"""["']({"|".join(members)})["']""")
    blind = [path for path in TEXTS if path.is_relative_to(ROOT / "cem") and path not in homes]
    assert not {path: found for path in blind if (found := quoted.findall(TEXTS[path]))}


def test_functions_take_at_most_twelve_arguments():
    """But for the original's surrogate, whose first seven are its own, and what is compiled for a device."""
    wide = []
    for path, node in nodes(ast.FunctionDef, under="cem"):
        arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len([name for name in arguments if name not in ("self", "cls")]) > 12:
            wide.append((path.name, node.name))
    assert wide == [("attention.py", "__init__")]


@pytest.mark.parametrize(
    ("package", "refused"),
    [
        ("cem_kernels", "cem|benchmarks"),
        ("cem", "benchmarks"),
        ("cem", r"matplotlib(\.| import .*)pyplot"),  # which chooses a global backend, and keeps every figure
    ],
)
def test_arrows_point_down_and_pyplot_is_left_alone(package, refused):
    for path, text in TEXTS.items():
        if path.is_relative_to(ROOT / package):
            assert not re.search(rf"^\s*(from|import) ({refused})\b", text, re.MULTILINE), path


@pytest.mark.parametrize("name", ["centroid", "slots", "attention"])
def test_from_the_step_to_the_launch_of_a_kernel_are_at_most_ten_frames_of_ours(name, monkeypatch):
    chains = []

    def launch(*_, **__):
        """In place of a kernel, whose result does not matter here."""
        code = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
        chains.append([each.co_name for each in code if Path(each.co_filename) in TEXTS])

    for operator in OPERATORS:
        monkeypatch.setattr(importlib.import_module(f"cem_kernels.{operator.name}.triton"), "launch", launch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 16, 4))
    model = SplitModel.from_sequential(network, 1, image_shape=(1, 6, 6)).to(device)
    context = cem.Context(model.feature_shape, (1, 6, 6), 4, 0.1, backend="triton")
    surrogate = cem.SURROGATES.build(name, context).to(device)
    term = weighted.WeightedTerm("surrogate", "s", surrogate, lambda epoch: 1.0, 0, device)
    term.before_epoch(0, 1)
    injection.combined(model, [term], torch.rand(8, 1, 6, 6, device=device), torch.arange(8, device=device) % 4)
    assert len(chains) >= 2  # forward and backward
    longest = max(chains, key=len)
    assert 2 < len(longest) + 2 <= 10, longest  # and the trainer's step, and the launch itself


def test_operators_folders_have_the_same_kinds_of_file():
    for operator in OPERATORS:
        files = {path.stem for path in operator.glob("*.py")}
        assert files >= {"__init__", "api", "reference", "eager", "triton", "kernels"}
        kinds = re.compile(r"__init__|api|reference|eager|triton|kernels(_\w+)?|weights|running")
        assert all(map(kinds.fullmatch, files)), files


def test_backends_of_an_operator_do_not_import_each_other():
    for operator in OPERATORS:
        for backend in ("reference", "eager", "triton"):
            others = "|".join({"reference", "eager", "triton", "api"} - {backend})
            refused = rf"from cem_kernels\.{operator.name}(\.({others})\b| import .*\b({others})\b)"
            assert not re.search(refused, TEXTS[operator / f"{backend}.py"]), (operator.name, backend)


def test_no_function_hides_a_module():
    """``import cem_kernels.slot_attention.weights`` means the module, whatever a package exports."""
    files = [path for path in TEXTS if path.is_relative_to(ROOT / "cem_kernels") and path.name != "__init__.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    for name in names:
        importlib.import_module(name)
    for name in names:
        package, _, last = name.rpartition(".")
        assert inspect.ismodule(getattr(sys.modules[package], last)), name


def test_launchers_take_at_most_sixty_lines_and_kernels_at_most_forty_names():
    for path, node in nodes(ast.FunctionDef, under="cem_kernels", only="*/*/triton.py"):
        assert node.end_lineno - node.lineno < 60, f"{path.parent.name}: {node.name}"
    for path, node in nodes(ast.FunctionDef, under="cem_kernels", only="*/*/kernels*.py"):
        assert len(node.args.args) <= 43, f"{path.name}: {node.name} takes {len(node.args.args)}"


def test_a_file_of_kernels_says_what_it_computes_what_a_program_owns_and_what_it_moves():
    assert len(KERNELS) >= len(OPERATORS)
    for path in KERNELS:
        said = ast.get_docstring(TREES[path]) or ""
        for needed in (" = ", "[Aa] program (owns|has|takes)|[Aa] tile is", "reads", "writes|written|adds"):
            assert re.search(needed, said), f"{path}: no {needed}"


def test_autograd_functions_set_their_context_up_apart():
    """Else ``torch.func.grad`` refuses them; and PyTorch's ``custom_fwd`` refuses those that do."""
    assert not [path for path, text in TEXTS.items() if "custom_fwd" in text]
    classes = [node for _, node in nodes(ast.ClassDef) if any("Function" in ast.unparse(base) for base in node.bases)]
    assert len(classes) >= 5
    for node in classes:
        assert "setup_context" in {each.name for each in node.body if isinstance(each, ast.FunctionDef)}, node.name


def test_tests_and_benchmarks_keep_to_their_budgets_of_lines():
    """What nobody can read through is not kept in order; ``benchmarks/gpu`` runs by hand, on a device."""
    over = []
    for folder, most in (("tests", 15_340), ("benchmarks", 2_650)):
        files = [path for path in sorted(ROOT.glob(f"{folder}/**/*.py")) if "gpu" not in path.relative_to(ROOT).parts]
        lines = {path: path.read_text(encoding="utf-8").count("\n") for path in files}
        if sum(lines.values()) > most:
            over.append(f"{folder} has {sum(lines.values())} lines of at most {most}")
        if folder == "tests":
            long = [path for path in files if lines[path] > 400]
            over += [f"{path.relative_to(ROOT)} has {lines[path]} lines of at most 400" for path in long]
    assert not over, "; ".join(over)
