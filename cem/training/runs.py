"""The run directory: whether a run may start in it, and how to get a trained model back out of it."""

from __future__ import annotations

import os
import shlex
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, count
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from cem.data import DataSplits
from cem.defenses import DEFENSES, NOISE, Chain
from cem.errors import CheckpointError, MachineError, UsageError
from cem.files import is_unfinished, read_json, writing
from cem.folders import LOCK, Lock, appear, remove_unfinished
from cem.models.split import SplitModel, build_split_model
from cem.options import FORMAT, read_yaml, resolve_device
from cem.terms import Context
from cem.training import checkpoint
from cem.training.config import TrainConfig, changed_options
from cem.training.evaluation import isolated_random


def check_place(config: TrainConfig) -> None:
    """Refuse what :func:`new_run` would refuse, before anything takes time.

    Raises:
        UsageError: ``config.out`` is not empty, so the run would overwrite something, or cannot be a directory.
        MachineError: nothing may be written there.
    """
    run_dir = config.run_dir
    with writing(run_dir):
        if config.out is not None and os.path.lexists(run_dir):
            if not run_dir.is_dir():
                raise UsageError(f"--out {run_dir}: it exists and is no directory")
            if not _is_free(run_dir):
                raise _taken(run_dir)
        above = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.lexists(path))
        if not above.is_dir():
            raise UsageError(f"run directory {run_dir} cannot be made: {above} is no directory")
        if not os.access(above, os.W_OK | os.X_OK):
            raise MachineError(f"run directory {run_dir} cannot be made: {above} may not be written to")


def new_run(config: TrainConfig, fill: Callable[[Path], None]) -> tuple[Path, Lock]:
    """The directory of a new run: ``config.run_dir``, numbered if that is taken and nobody asked for it.

    It appears complete, so that a run that is killed at any moment can be resumed or has left nothing.

    Args:
        config: the run's options.
        fill: writes what a run begins with: ``last.pt`` first, which alone is enough to resume it.

    Returns:
        The directory, and the lock that keeps others out of it.

    Raises:
        UsageError: ``config.out`` is taken.
        MachineError: it cannot be written.
    """
    run_dir = config.run_dir
    if config.out is not None and run_dir.is_dir():
        # Somebody's working directory perhaps, or where another disk is mounted: it stays the one that it is.
        lock = Lock(run_dir)
        try:
            if not _is_free(run_dir):
                raise _taken(run_dir)
            remove_unfinished(run_dir)
            fill(run_dir)
        except BaseException:
            lock.release()
            raise
        return run_dir, lock
    numbered = (run_dir.with_name(f"{run_dir.name}-{number}") for number in count(2))
    made = appear(chain([run_dir], numbered if config.out is None else ()), fill)
    if made is None:
        raise _taken(run_dir)
    return made


def _is_free(run_dir: Path) -> bool:
    return all(path.name == LOCK or is_unfinished(path) for path in run_dir.iterdir())


def _taken(run_dir: Path) -> UsageError:
    if (run_dir / "summary.json").exists():
        hint = "a finished run lies there; choose another --out, or another --seed"
    elif (run_dir / "last.pt").exists():
        hint = f"to continue the run that lies there: {resume_command(run_dir)}"
    else:
        hint = "choose another --out"
    return UsageError(f"run directory {run_dir} exists and is not empty: {hint}")


def data_fingerprint(data: DataSplits) -> dict[str, int]:
    """What tells other data from the same: sizes of the three sets, checksums of what is trained on."""
    return {
        "training images": len(data.train),
        "validation images": len(data.val),
        "test images": len(data.test),
        "checksum of the training images": zlib.crc32(data.train.images.contiguous().numpy().data),
        "checksum of the training labels": zlib.crc32(data.train.labels.contiguous().numpy().data),
    }


def check_same_data(before: Mapping[str, int], after: Mapping[str, int], run_dir: Path) -> None:
    """Raise :class:`UsageError` if the fingerprints differ: the run in ``run_dir`` was trained on other data."""
    changed = [f"{name} (was {before.get(name)}, got {now})" for name, now in after.items() if before.get(name) != now]
    if changed:
        raise UsageError(f"the run in {run_dir} was trained on other data: {', '.join(changed)}")


def check_same(before: TrainConfig, after: TrainConfig, run_dir: Path) -> None:
    """Raise :class:`UsageError` if ``after`` cannot continue what ``before`` began in ``run_dir``."""
    changed = changed_options(before, after)
    if changed:
        hint = ""
        if before.epochs != after.epochs:
            path = shlex.quote(str(run_dir))
            more = f"--config {path}/config.yaml --init-from {path} --epochs {after.epochs}"
            hint = (
                "; the learning rate falls with each quarter of --epochs, so a run of another length is another run: "
                f"python -m cem.train {more} begins one with the weights of this one"
            )
        raise UsageError(f"the run in {run_dir} cannot be continued with other options: {', '.join(changed)}{hint}")


def resume_command(run_dir: Path) -> str:
    """The command line that continues the run in ``run_dir``."""
    return f"python -m cem.train --resume {shlex.quote(str(run_dir))}"


def context_of(config: TrainConfig, model: SplitModel, data_facts: Mapping[str, Any]) -> Context:
    """What members of families may know of a run."""
    image_shape, num_classes, train_size = (data_facts[name] for name in ("image_shape", "num_classes", "train_size"))
    of_run = {name: getattr(config, name) for name in ("noise_std", "backend", "seed")}
    return Context(
        model.feature_shape, tuple(image_shape), num_classes, bounded=model.bounded, train_size=train_size, **of_run
    )


def build_model(config: TrainConfig, data_facts: Mapping[str, Any]) -> SplitModel:
    """The untrained model of a run, with its defenses.

    Args:
        config: the run's options.
        data_facts: ``num_classes``, ``image_shape``, ``mean``, ``std`` and ``train_size`` of its data.
    """
    model = build_undefended(config, data_facts)
    model.defense = Chain({}) if config.centralized else build_defenses(config, context_of(config, model, data_facts))
    return model


def build_undefended(config: TrainConfig, data_facts: Mapping[str, Any]) -> SplitModel:
    """The same without defenses; see :func:`build_model`."""
    facts = {name: data_facts[name] for name in ("num_classes", "mean", "std")}
    shape, whole = tuple(data_facts["image_shape"]), config.centralized
    # A network in one piece has no cut to narrow or to disturb; noise_std then only scales the penalty.
    bottleneck = "none" if whole else config.bottleneck
    return build_split_model(
        config.arch,
        image_shape=shape,
        cut_layer=config.cut_layer,
        adapter=config.adapter,
        bottleneck=bottleneck,
        centralized=whole,
        **facts,
    )


def build_defenses(config: TrainConfig, context: Context) -> Chain:
    """The defenses of a run in their order; noise comes first unless it is named. Random states stay as they are."""
    given = {DEFENSES[each].name: each for each in config.defenses}
    members, weights = {}, {}
    with isolated_random(config.seed, torch.device("cpu")):
        for name, each in (given if NOISE in given else {NOISE: NOISE, **given}).items():
            options = config.options_of(name) if name in given else DEFENSES[each].Options()
            members[name], weights[name] = DEFENSES.build(each, context, options), options.weight
        return Chain(members, weights)


def load_weights(
    model: SplitModel, content: dict[str, Any], path: Path, parts: Sequence[str] = ("encoder", "defense", "server")
) -> None:
    """Load parts of the model out of a checkpoint.

    Raises:
        CheckpointError: if they are another model's.
    """
    for part in parts:
        checkpoint.load_state(getattr(model, part), content, part, path)


def read_config(run_dir: Path) -> TrainConfig:
    """The options of the run in ``run_dir``.

    Raises:
        UsageError: it is no run directory.
        CheckpointError: it is one of another version.
    """
    path, last = run_dir / "config.yaml", run_dir / "last.pt"
    if not path.exists():
        if not last.exists():
            raise UsageError(f"{run_dir} holds no run: there is no {path}")
        with checkpoint.fitting(last, "config"):  # it was killed before it could write the other
            return TrainConfig.from_dict(checkpoint.load(last, checkpoint.RUN)["config"])
    found = read_yaml(path).get("format")
    if found != FORMAT:
        raise CheckpointError(f"{run_dir} was made by another version: its format is {found}, this one reads {FORMAT}")
    return TrainConfig.from_yaml(path)


def load_run(run_dir: Path | str, device: str = "auto") -> tuple[TrainConfig, SplitModel]:
    """Get back what a run trained: its options, and its model with the weights of ``best.pt``.

    The model is in evaluation mode, where noise stays on, as it does in use. The data set is not needed.

    Raises:
        UsageError: if ``run_dir`` is no run directory, or there is no such device.
        CheckpointError: if ``best.pt`` is missing, damaged or another run's.
    """
    run_dir = Path(run_dir).expanduser()
    config, path = read_config(run_dir), run_dir / "best.pt"
    content = checkpoint.load(path, checkpoint.RUN)
    with checkpoint.fitting(path, "data_facts"):
        model = build_model(config, content["data_facts"])
    load_weights(model, content, path)
    return config, model.to(resolve_device(device)).eval()


def read_summary(run_dir: Path | str) -> dict[str, Any] | None:
    """The ``summary.json`` of a finished run, or ``None``: it is the last file that a run writes.

    Raises:
        CheckpointError: it is damaged.
    """
    return read_json(Path(run_dir).expanduser() / "summary.json", "test_accuracy")


def versions() -> dict[str, str | None]:
    """Versions of what computed the numbers; ``None`` where a package is not installed."""
    found: dict[str, str | None] = {"python": python_version()}
    for name in ("torch", "triton", "numpy", "scikit-learn", "cem"):
        try:
            found[name] = version("cem-kernels" if name == "cem" else name)
        except PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device) -> str:
    """``"cpu"``, or ``"cuda (NVIDIA H200)"``: a figure is worth nothing without the machine."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def peak_memory(device: torch.device) -> int | None:
    """Most memory [bytes] that was in use so far: PyTorch's own on CUDA, else that of the whole process.

    ``None`` where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, all others KiB


def origin(device: torch.device) -> dict[str, Any]:
    """What figures come from: ``peak_memory_bytes``, ``device``, ``threads`` (of PyTorch, on the CPU), ``versions``."""
    facts = {"peak_memory_bytes": peak_memory(device), "device": device_name(device)}
    return {**facts, "threads": torch.get_num_threads(), "versions": versions()}
