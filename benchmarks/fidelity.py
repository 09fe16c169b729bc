"""``python -m benchmarks.fidelity FOLDER... [--out FILE]``: whose value tells what an attacker will reconstruct?

Takes directories of runs that were trained and attacked, and folders of such runs, as ``python -m cem.compare --out
FOLDER`` leaves them. The attackers' error is that of the run's ``attack/attack.json``, and so is what each surrogate
says of its features; of a run attacked before there was some of it, that is worked out anew from the weights.
Spearman's rank correlation with a bootstrap interval says how well the two orders agree: -1 is best, for what a
surrogate says falls as the attackers' error grows. Runs that differ in nothing but the seed are drawn together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.gpu.report import write_json
from benchmarks.resampling import resamples, spearman_difference
from cem.attacks.config import AttackConfig
from cem.attacks.target import Target
from cem.comparison.correlation import RESAMPLES, spearman
from cem.surrogates import CONTROL, RECOMMENDED, SURROGATES
from cem.training.config import TrainConfig
from cem.training.runs import read_config

VALUES = {*SURROGATES} - {CONTROL} | {"log_det"}
"""What the attack on a run says of its features."""


def runs_of(folder: Path) -> list[Path]:
    """The folder, if it is a run, else the runs in it.

    Raises:
        FileNotFoundError: there is none.
    """
    if (folder / "config.yaml").is_file():
        return [folder]
    runs = sorted(path.parent for path in folder.glob("*/config.yaml"))
    if not runs:
        raise FileNotFoundError(f"{folder} is no run and holds none: there is no config.yaml")
    return runs


def values_of(run: Path, data_root: Path | None) -> dict[str, Any]:
    """One run: its options, the error of the strongest attacker on unseen images, and what the surrogates say.

    Raises:
        FileNotFoundError: the run was not attacked.
        CheckpointError: its weights are needed and not there.
    """
    attack = json.loads((run / "attack" / "attack.json").read_text())
    information = attack["information"]
    if "within_variance" not in information or not information["values"].keys() >= VALUES:
        options = replace(AttackConfig.from_yaml(run / "attack" / "config.yaml"), data_root=data_root)
        information = Target(run, options).information(options)
    return {
        "run": run.name,
        "options": options_of(read_config(run)),
        "test_accuracy": attack["run"]["test_accuracy"],
        "test_mse": attack["test_target"]["mse"],
        "within_variance": information["within_variance"],
        "between_variance": information["between_variance"],
        "values": information["values"],
    }


def options_of(config: TrainConfig) -> dict[str, Any]:
    """All options of a run, for defaults may change; but for where its files are."""
    return {name: value for name, value in config.to_dict().items() if name not in ("out", "data_root", "init_from")}


def correlations(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Spearman's ρ of every value with the error, its 95 % interval, and of how many runs."""
    found = {}
    for name in rows[0]["values"]:
        known = [row for row in rows if row["values"][name] is not None]
        values, errors = [row["values"][name] for row in known], [row["test_mse"] for row in known]
        rho, low, high, note = spearman(values, errors, drawn=resamples([setting_of(row) for row in known]))
        found[name] = {"rho": rho, "low": low, "high": high, "runs": len(known), "note": note}
    return found


def setting_of(row: dict[str, Any]) -> str:
    """All options but the seed: runs that differ in nothing else are drawn together when intervals are made."""
    return json.dumps({name: value for name, value in row["options"].items() if name != "seed"})


def differences(rows: list[dict[str, Any]], found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """ρ of the recommended value minus that of each other one, over the runs that have both, with its interval."""
    between = {}
    for name, each in found.items():
        known = [row for row in rows if None not in (row["values"][RECOMMENDED], row["values"][name])]
        triples = [(row["values"][RECOMMENDED], row["values"][name], row["test_mse"]) for row in known]
        if name != RECOMMENDED and None not in (each["rho"], found[RECOMMENDED]["rho"]):
            drawn = resamples([setting_of(row) for row in known])
            difference, low, high = spearman_difference(*zip(*triples, strict=True), drawn)
            between[name] = {"difference": difference, "low": low, "high": high}
    return between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", metavar="FOLDER", type=Path, help="a run, with attack/attack.json, or a folder of runs"
    )
    parser.add_argument("--data-root", type=Path, help="where the data set is, if not where the runs found it")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("fidelity.json"), help="JSON to write (default: %(default)s)"
    )
    arguments = parser.parse_args()

    try:
        runs = [run for folder in arguments.folders for run in runs_of(folder)]
    except FileNotFoundError as error:
        parser.error(str(error))
    rows = [values_of(run, arguments.data_root) for run in tqdm(runs, disable=None)]
    found = correlations(rows)
    between = differences(rows, found)
    write_json(arguments.out, {"resamples": RESAMPLES, "spearman": found, "of_recommended": between, "runs": rows})
    for name, each in sorted(found.items(), key=lambda item: item[1]["rho"] or 0):
        if each["rho"] is None:
            print(f"{name:20s} {each['note']}")
        else:
            line = f"{name:20s} {each['rho']:+.3f}  [{each['low']:+.3f}, {each['high']:+.3f}]  {each['runs']} runs"
            if name in between:
                of = between[name]
                line += f"; {RECOMMENDED} {of['difference']:+.3f} to it  [{of['low']:+.3f}, {of['high']:+.3f}]"
            print(line)


if __name__ == "__main__":
    main()
