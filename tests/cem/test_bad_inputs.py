"""What cannot be used: one line says what was expected and what came, and nothing that was there is lost."""

import re
import shlex
import shutil
import sys
import warnings
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from bad_files import (
    IDX,
    IMAGES,
    LABELS,
    TESTED,
    bomb,
    cut,
    entries,
    file,
    flipped,
    gone,
    header,
    idx,
    options,
    pictures,
)

from cem import attack, compare, train
from cem.attacks.config import AttackConfig
from cem.comparison.config import Comparison
from cem.comparison.grid import GridOptions
from cem.folders import Lock
from cem.training import TrainConfig
from cem.training.injection import INJECTIONS
from cem_kernels import backends

pytestmark = pytest.mark.slow

ATTACK = "--attacks decoder --decoder.networks=deconvC4 --decoder.cycle-epochs=1 --decoder.max-cycles=1 --aux-size=64"
ON_COMPARE = "--config compare/compare.yaml --out compare"
INIT = "--cut-layer 2 --init-from run"
MNIST, FOLDER = "--data mnist --data-root mnist", "--data folder --data-root pets"
ONE = "compare/none-cut2-noise0.3-seed0"
LONG, HUGE = "x" * 300, "1" + "0" * 12


def alone():
    """Triton is not interpreted."""
    return mock.patch.object(backends, "INTERPRETING", False)


# A command line; pieces of the message, parted by an ellipsis; what is made before.
TRAIN_OPTIONS = [
    ("--epochs 0", "--epochs must be at least 1, got 0"),
    ("--epochs 1.5", "--epochs takes a whole number, got '1.5'"),
    ("--epochs", "--epochs … expected one argument"),
    ("--epoch 3", "there is no option --epoch; did you mean --epochs?"),
    ("--amp yes", "'yes' belongs to no option"),
    ("--lr nan", "--lr … above 0 … got nan"),
    ("--sgd-momentum 1", "--sgd-momentum must be at least 0 and below 1, got 1"),
    ("--injection both", "--injection takes one of combined, two_pass, got 'both'"),
    ("--data minst", "--data must be one of … mnist … got 'minst'"),
    ("--train-size 99999", "train … 1294 … got 99999"),
    ("--surrogate centriod", "--surrogate takes … centroid … got 'centriod'"),
    ("--surrogate json:JSONDecoder", "--surrogate json:JSONDecoder must be a class derived from cem"),
    ("--defenses nois", "--defenses takes noise … got 'nois'"),
    ("--defenses noise noise", "--defenses … noise"),
    ("--slots.num-slot 5", "no option --slots.num-slot; did you mean --slots.num-slots?"),
    ("--surrogate attention --attention.num-slots 0", "--attention.num-slots must be at least 1, got 0"),
    ("--device tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    ("--device cuda:999", "--device … cuda:999"),
    ("--backend triton --device cpu", "--backend triton needs a CUDA device, got cpu", alone),
    ("--cut-layer 99", "cut … 1..10 … got 99"),
    ("--bottleneck K4C8S1", "bottleneck … kernel … odd … got 4"),
    (f"--bottleneck C{HUGE}S1", f"bottleneck … C{HUGE}S1"),
    ("--bottleneck C4000000S1", "out of memory: the model takes at least 538 … GB … --bottleneck"),
    (f"--image-size {HUGE}", "out of memory … --image-size"),
    ("--arch vgg11_bn --train-size 1", "--train-size 1: vgg11_bn"),
    ("--arch vgg11 --cut-layer 7 --adapter 1 --batch-size 1", "--batch-size 1: vgg11 with an adapter"),
    ("--arch vgg11_bn --batch-size 1", "--batch-size 1: vgg11_bn"),
    (f"--surrogate mixture --mixture.clusters {HUGE}", "out of memory … GB … of the surrogate"),
]
YAML = [
    ("--config absent.yaml", "absent.yaml … No such file"),
    ("--config a.yaml", "a.yaml", file("a.yaml", "lr: [1")),
    ("--config a.yaml", "a.yaml must hold a mapping … got ['lr']", file("a.yaml", "- lr\n")),
    ("--config a.yaml", "a.yaml must hold a mapping … got", file("a.yaml")),
    ("--config a.yaml", "a.yaml … UTF-8", file("a.yaml", b"\xff\xfe\x00lr")),
    ("--config a.yaml", "a.yaml … line 3 … lr … line 1", file("a.yaml", "lr: 1\nepochs: 2\nlr: 2\n")),
    ("--config a.yaml", "a.yaml … no option epoch; did you mean epochs?", file("a.yaml", "epoch: 1\n")),
    ("--config a.yaml", "a.yaml … *a", file("a.yaml", "lr: &a [*a]\n")),
    ("--config a.yaml", "a.yaml … --data-root … a\\x00b", file("a.yaml", 'data: mnist\ndata_root: "a\\0b"\n')),
    ("--config a.yaml", "a.yaml … mixture, which is not chosen", file("a.yaml", "mixture: {clusters: 2}\n")),
    ("--config a.yaml", "a.yaml", file("a.yaml", "!!python/object/apply:os.system [touch harm]\n")),
    ("--config a.yaml", "a.yaml", file("a.yaml", "[" * 5000)),
    ("--config compare/compare.yaml", "compare/compare.yaml: there is no option surrogates"),
]
DATA = [
    ("--data mnist --data-root mnist", "train-images-idx3-ubyte … mnist", file("mnist/")),
    (MNIST, f"mnist/{IMAGES} … 31360 … 31350", idx(IMAGES, IDX[IMAGES][:-10])),
    (MNIST, f"mnist/{IMAGES}", idx(IMAGES, b"")),
    (MNIST, f"mnist/{IMAGES}.gz", idx(IMAGES, b"", ".gz")),
    (MNIST, f"mnist/{IMAGES}", idx(IMAGES, header(*[2**32 - 1] * 3))),
    (MNIST, f"mnist/{IMAGES}", idx(IMAGES, header(40, 0, 28))),
    (MNIST, "mnist/train-labels-idx1-ubyte … 00000801", idx(LABELS, IDX[IMAGES])),
    (MNIST, "mnist/train-labels-idx1-ubyte … 0..9 … 77", idx(LABELS, header(40) + bytes([77]) * 40)),
    (MNIST, "40 images … 39 labels", idx(LABELS, header(39) + bytes(39))),
    (MNIST, "mnist: … 28x28 and 14x14", idx(TESTED, header(20, 14, 14) + bytes(20 * 14 * 14))),
    ("--data cifar10 --data-root absent", "absent/cifar-10-batches-py … --download"),
    ("--data cifar10 --data-root c", "c/cifar-10-batches-py", file("c/cifar-10-batches-py/data_batch_1", "x")),
    (FOLDER, "pets … train/CLASS", file("pets/")),
    (FOLDER, "pets", file("pets", "x")),
    (FOLDER, "pets … cat", pictures("cat")),
    (FOLDER, "dog of pets", pictures("cat"), file("pets/dog/")),
    (FOLDER, "dog of pets … .png", pictures("cat"), file("pets/dog/0.txt")),
    (FOLDER, "pets/cat/broken.png", pictures("cat", "dog"), file("pets/cat/broken.png", "x")),
    (FOLDER, "pets/cat/0.png", pictures("cat", "dog"), cut("pets/cat/0.png", 150)),
    (FOLDER, "pets/cat/huge.bmp", pictures("cat", "dog"), bomb),
    (FOLDER, "pets/cat/gone.png", pictures("cat", "dog"), lambda: Path("pets/cat/gone.png").symlink_to("nowhere.png")),
    (FOLDER, "pets", pictures(".cat", ".dog")),
    (FOLDER, "pets … no class folders in train", pictures("train", "test")),
    (FOLDER, "pets … test", pictures("train/cat", "train/dog", "test/cat")),
    (FOLDER, "2 images are too few", pictures("cat", "dog", count=1)),
    (f"{FOLDER} --image-size {HUGE}", "out of memory … --image-size", pictures("cat", "dog")),
]
RUNS = [
    ("--out=", "--out … ''"),
    ("--out run", "run … a finished run lies there"),
    ("--out begun", "begun … --resume begun"),
    ("--out a", "a … not empty", file("a/notes.txt", "x")),
    ("--out a", "a … no directory", file("a", "x")),
    ("--out a/run", "a/run … a … directory", file("a", "x")),
    ("--out /proc/run", "/proc/run"),
    (f"--out {LONG}", "--out takes a path … got 'xxx"),
    ("--out a", "a", lambda: Path("a").symlink_to("nowhere/else")),
    ("--resume absent", "absent"),
    ("--resume=", "--resume … ''"),
    ("--resume a", "a … config.yaml", file("a/")),
    ("--resume run --lr 1", "run … --lr (was 0.05, got 1.0)"),
    ("--resume begun", "begun … other data", entries("begun/last.pt", data_fingerprint={"training images": 1})),
    ("--resume begun", "begun/config.yaml", file("begun/config.yaml", "lr: [")),
    ("--resume begun", "begun … format … 99", options("begun/config.yaml", format=99)),
    ("--resume begun", "begun … --arch (was resnet20, got vgg11)", options("begun/config.yaml", arch="vgg11")),
    ("--resume begun", "begun/last.pt", gone("begun/last.pt")),
    ("--resume begun", "begun/last.pt", flipped("begun/last.pt")),
    ("--resume begun", "begun/last.pt", file("begun/last.pt", "epoch,lr\n1,2\n")),
    ("--resume begun", "begun/last.pt", gone("begun/last.pt"), file("begun/last.pt/")),
    ("--resume begun", "begun/last.pt", entries("begun/last.pt", encoder={})),
    ("--resume begun", "begun/last.pt", entries("begun/last.pt", "optimizers")),
    ("--resume begun", "another process is at work in begun: process", lambda: Lock(Path("begun"))),
    ("--resume run", "run/summary.json", file("run/summary.json", "{")),
    ("--init-from=", "--init-from … ''"),
    ("--init-from a.pt", "a.pt", file("a.pt", "epoch,lr\n1,2\n")),
    ("--init-from a", "a/best.pt", file("a/")),
    (f"{INIT}/best.pt", "run/best.pt", flipped("run/best.pt")),
    (f"{INIT} --arch vgg11", "run/best.pt … encoder"),
    (INIT, "run/best.pt", entries("run/best.pt", "server")),
    ("--init-from run/attack/decoder-deconvC4.pt", "run/attack/decoder-deconvC4.pt … encoder"),
]
OF_ATTACKS = [
    ("", "which run? … RUN"),
    ("absent", "absent holds no finished run"),
    ("a", "a/summary.json: Not a directory", file("a", "x")),
    ("begun", "begun holds no finished run"),
    ("RUN", "run/summary.json", file("run/summary.json", '{"a"')),
    ("RUN", "run/summary.json … test_accuracy", file("run/summary.json", "{}")),
    ("RUN", "run/best.pt", gone("run/best.pt")),
    ("RUN", "run/best.pt", flipped("run/best.pt")),
    ("RUN", "run/best.pt", entries("run/best.pt", "data_facts")),
    ("RUN", "run/best.pt", entries("run/best.pt", "data_fingerprint")),
    ("RUN", "run/best.pt", entries("run/best.pt", encoder={})),
    ("RUN", "run … other data", entries("run/best.pt", data_fingerprint={"training images": 1})),
    ("RUN", "absent … --data-root", options("run/config.yaml", data="mnist", data_root="absent")),
    ("RUN --control absent", "--control absent"),
    ("RUN --control begun", "--control begun"),
    (f"RUN --control {ONE}", f"--control {ONE}", file(f"{ONE}/attack/attack.json", "[]")),
    ("run --out run/attack --seed 3", "run/attack … --seed (was 0, got 3)"),
    ("RUN", "run/attack/attack.json", file("run/attack/attack.json", "{")),
    ("RUN --out a", "a", file("a", "x")),
    ("RUN --out a", "a … notes.txt", file("a/notes.txt", "x")),
    ("RUN --out run", "run/config.yaml"),
    ("RUN --out a --attacks", "--decoder.networks is an option of decoder, which is not chosen"),
    ("RUN --out a --attacks decoder decoder", "--attacks names decoder twice"),
    ("RUN --out a --decoder.networks", "--decoder.networks needs at least one"),
    ("RUN --out a --decoder.networks deconvC4 deconvC4:mse", "--decoder.networks … deconvC4:mse twice"),
    ("RUN --out a --aux-size 99999", "--aux-size must be in 1..1100 … got 99999"),
    ("RUN --knowledge", "--knowledge needs at least one"),
    ("RUN --out a --config run/config.yaml", "run/config.yaml … no option data"),
]
COMPARISONS = [
    ("--surrogates centriod", "--surrogate … centroid … got 'centriod'"),
    ("--surrogates", "--surrogates needs at least one value"),
    ("--seeds 0 0", "none-noise0.3-seed0"),
    ("--lambds 0", "--lambds must be … above 0, got 0"),
    ("--noise-stds nan", "--noise-stds must be finite … got nan"),
    ("--attack.decoder.networks resnet", "--attack.decoder.networks resnet"),
    ("--attack.device tpu", "--attack.device must be … got 'tpu'"),
    ("--variants [", "--variants takes YAML"),
    ("--surrogates x --variants 'x: {epochz: 3}'", "--variants: x cannot set 'epochz'; did you mean epochs?"),
    ("--report-only --out a", "a/compare.yaml", file("a/compare.yaml", "x")),
    ("--config run/config.yaml", "run/config.yaml: surrogate: a comparison takes a list, surrogates"),
    ("--out=", "--out … ''"),
    ("--out a", "a", file("a", "x")),
    ("OUT --lr 1", f"{ONE} … --lr (was 0.05, got 1.0)"),
    ("OUT --attack.decoder.lr 1", f"{ONE} … --attack.decoder.lr (was 0.002, got 1.0)"),
    ("OUT", f"{ONE} is in the way", gone(ONE), file(f"{ONE}/notes.txt", "x")),
    ("OUT", "another … at work in compare", lambda: Lock(Path("compare"))),
    ("OUT --report-only", "compare/failures.json", file("compare/failures.json", "{")),
]
TABLE = {train: TRAIN_OPTIONS + YAML + DATA + RUNS, attack: OF_ATTACKS, compare: COMPARISONS}


@pytest.fixture(scope="session")
def home(trained, run, tmp_path_factory):
    """A finished and attacked run, one that only needs its summary, and a comparison of the first."""
    path = tmp_path_factory.mktemp("home")
    shutil.copytree(trained.path, path / "run")
    assert run(attack, [str(path / "run"), *ATTACK.split(), "--device=cpu"]).code == 0
    shutil.copytree(path / "run", path / "begun", ignore=shutil.ignore_patterns("summary.json", "attack"))
    shutil.copytree(path / "run", path / ONE)
    grid = GridOptions(surrogates=("none",), seeds=(0,), cut_layer=(2,))
    comparison = Comparison(
        grid, TrainConfig.from_yaml(path / "run/config.yaml"), AttackConfig.from_yaml(path / "run/attack/config.yaml")
    )
    replace(comparison, out=path / "compare").to_yaml(path / "compare/compare.yaml", "python -m cem.compare")
    assert not [*path.rglob(".*")], "locks and temporary files go with those who made them"
    return path


def accepted(*args, **kwargs):
    raise AssertionError("the command accepted this and began to compute")


def everything():
    return {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}


@pytest.mark.parametrize(
    ("command", "line", "message", "prepare"),
    [
        pytest.param(command, line, message, prepare, id=f"{command.__name__[4:]} {line[:60]}")
        for command, rows in TABLE.items()
        for line, message, *prepare in rows
    ],
)
def test_it_is_refused_in_a_line_and_nothing_changes(command, line, message, prepare, home, run, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(home, tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in INJECTIONS:
        monkeypatch.setitem(INJECTIONS, name, accepted)
    monkeypatch.setattr("cem.attacks.run.AttackRun._attack", accepted)
    monkeypatch.setattr("cem.comparison.runner.run_queues", accepted)
    with ExitStack() as stack, warnings.catch_warnings(record=True) as noise:
        for make in prepare:
            made = make()
            stack.enter_context(made if hasattr(made, "__exit__") else nullcontext())
        before = everything()
        said = run(command, shlex.split(line.replace("OUT", ON_COMPARE).replace("RUN", f"run {ATTACK}")))
        assert everything() == before
    *notes, last = said.err.splitlines()
    assert (said.code, said.out, last[:7]) == (2, "", "error: "), said.err
    assert not notes or command is compare, said.err  # which says first what it is about
    assert re.search(".*".join(map(re.escape, message.split(" … "))), last), last
    assert [str(each.message) for each in noise if each.category in (UserWarning, RuntimeWarning, FutureWarning)] == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("stream", "code"), [("stdout", 2), ("stderr", 0)])
def test_streams_that_take_nothing_are_no_bugs(stream, code, trained, monkeypatch, capsys):
    full = open("/dev/full", "w")  # noqa: SIM115 - what is left in it cannot be flushed
    monkeypatch.setattr(sys, stream, full if stream == "stdout" else None)
    assert train.main([f"--resume={trained.path}"]) == code
    said = capsys.readouterr()
    assert said.err == ("error: what goes to stdout cannot be written: the disk is full\n" if code else "")
    assert bool(said.out) == (stream == "stderr")
