"""Attack a trained run: every attack, the controls, and the files that say what came of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cem import interrupts
from cem.attacks.base import TRAINED, UNSEEN, VAL, Exposed, Guesses, Own, Progress, Record
from cem.attacks.config import AttackConfig
from cem.attacks.control_run import find_control, read_control
from cem.attacks.controls import CLASS_MEAN, control_guesses
from cem.attacks.metrics import METRICS, best, judged, ssim_window
from cem.attacks.pictures import keep_pictures
from cem.attacks.splits import varied
from cem.attacks.target import Target
from cem.errors import CemError, UsageError
from cem.files import is_unfinished, read_json, write_json, writing
from cem.folders import LOCK, Lock, remove_left_lock, remove_unfinished
from cem.machine import enough
from cem.progress import about, bar
from cem.report.attack_curves import draw_attack_curves
from cem.report.reconstructions import draw_reconstructions
from cem.training import runs
from cem.training.runlog import draw_or_log, log_refusal, run_log

BIG = "--aux-size, --score-size, or what the attacks take"  # what decides how much memory they need
PICTURES = 10  # images in the grid
LOG = "attack.log"
FEW_IMAGES = 500  # with fewer to learn from, a failed attack says little
_RESULT = ("attacks", "worst", "config", "sizes", "run")


class AttackRun:
    """Attacks one trained run and leaves a directory behind.

    Construction reads run and data, so what is wrong with either is known before anything is written.

    Args:
        run_dir: a finished run of ``python -m cem.train``.
        config: the options, with one kind of knowledge.
        out: directory for the results; ``run_dir/attack`` if left out, with the knowledge and the number of queries in
            its name where they are not the usual ones. One that holds the beginning of the same attack is continued, as
            is one with fewer attacks or smaller bounds.

    Attributes:
        out: where the results lie.
        finished: content of ``attack.json`` if this attack was finished already, else ``None``.
        target: the run's model and data.

    Raises:
        UsageError: an option cannot be used, ``run_dir`` holds no finished run, its data are others now or leave
            nothing for an attacker, ``out`` holds another attack, or the control is none.
        CheckpointError: the run's ``best.pt`` is damaged.
        DataError: the data cannot be read.
    """

    def __init__(self, run_dir: Path, config: AttackConfig, out: Path | None = None) -> None:
        self.config = config = config.checked()
        name = config.directory
        run_dir = Path(run_dir).expanduser()
        self.out = run_dir / name if out is None else Path(out).expanduser()
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"--out {self.out} exists and is no directory")
        self.target = Target(run_dir, config)
        self.finished = self._check_out()
        if config.control is None:
            self._control = find_control(self.target, config, name)
        else:
            self._control = read_control(config.control, self.target, config, name)
        self._exposed, self._own = self.target.exposed(config.queries, config.seed)
        for member in config.chosen().values():
            member().check(self._exposed, self._own, config.options_of(member.name))

    def run(self) -> dict[str, Any]:
        """Run and score all attacks, draw the pictures, write ``attack.json``.

        Returns:
            Its content. An attack that was finished already is left as it is, but for the lock of a process that was
            killed after its last file.

        Whatever ends it early goes to the log and is handed on.

        Raises:
            KeyboardInterrupt: what was finished is kept; the same call goes on from there.
            DivergedError: a loss is not finite.
            UsageError: another process attacks in ``out``.
            MachineError: a file cannot be written, or memory ran out.
        """
        if self.finished is not None:
            remove_left_lock(self.out)
            return self.finished
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        with Lock(self.out), run_log(self.out, LOG) as self._log:
            self.finished = self._check_out()  # another process may have finished it meanwhile
            if self.finished is not None:
                return self.finished
            try:
                with interrupts.heeded(), writing(self.out), enough("the attack", BIG):
                    remove_unfinished(self.out)
                    self.config.to_yaml(self.out / "config.yaml")
                    return self._run()
            except KeyboardInterrupt:
                self._log.warning("interrupted; what was finished is kept, the same command goes on")
                raise
            except CemError as error:
                log_refusal(self._log, error, "; what was finished is kept, the same command goes on")
                raise
            except Exception as error:
                self._log.error("the attack failed: %s", error)
                raise

    def _run(self) -> dict[str, Any]:
        config, target, exposed, own = self.config, self.target, self._exposed, self._own
        start, sizes = time.perf_counter(), target.splits.sizes()
        self._say_what_comes(sizes)
        labels = {name: images.labels[:n] for name, (n, images) in target.judged.items()}
        controls = control_guesses(exposed, own, labels)
        records, attacks = self._attack(exposed, own)
        scored = {f"scored_{name}": n for name, (n, _) in target.judged.items()}
        worst = {
            f"worst{'' if part == 'metrics' else f'_{part}'}": _worst(attacks, part)
            for part in ("metrics", TRAINED)
            if all(part in each for each in attacks.values())
        }
        control = self._control
        result = {
            "run": target.facts(),
            "config": config.to_dict(),
            "target_checksum": target.checksum,
            "data_checksum": target.data_checksum,
            "knowledge": config.knowledge[0],
            "sizes": {**sizes, **scored},
            "ssim_window": ssim_window(*target.image_shape[1:]),
            "attacks": attacks,
            **worst,
            "controls": {name: self._scores(guesses) for name, guesses in controls.items()},
            "undefended": control and {"name": control["run"]["name"], "worst": control["worst"]},
            "information": target.information(config),
            "seconds": time.perf_counter() - start,
            **runs.origin(target.device),
        }
        self._pictures(result, records, controls[CLASS_MEAN][UNSEEN])
        write_json(self.out / "attack.json", result)
        known = {metric: found for metric, found in result["worst"].items() if found["value"] is not None}
        said = (f"{metric} {found['value']:.4g} ({found['attack']})" for metric, found in known.items())
        self._log.info(f"the worst of all: {', '.join(said)}")
        return result

    def _say_what_comes(self, sizes: Mapping[str, int]) -> None:
        config, target = self.config, self.target
        known, chosen = sizes["attacker_train"], sizes["attacker_val"]
        scored = " and ".join(
            f"{n} {'unseen images' if name == UNSEEN else 'that it was trained on'}"
            for name, (n, _) in target.judged.items()
        )
        self._log.info(
            f"attack on {target.run_dir}: {', '.join(config.chosen())}; knowledge {config.knowledge[0]}: "
            f"{known} images to learn from, {chosen} to choose with; scored on {scored}; "
            f"queries an image: {config.queries}; "
            f"{runs.device_name(target.device)}"
        )
        for note in target.notes:
            self._log.info(note)
        if known < FEW_IMAGES:
            self._log.warning(f"{known} images make a weak attacker; train the target with --train-size to leave more")

    def _attack(self, exposed: Exposed, own: Own) -> tuple[dict[str, Record], dict[str, Any]]:
        """Run the attacks, those first that others start from; by name, their records and what these are worth."""
        config = self.config
        members = {name: member() for name, member in config.chosen().items()}
        forecasts = {name: each.forecast(exposed, own, config.options_of(name)) for name, each in members.items()}
        whole = sum(forecasts.values())
        self._log.info(f"takes about {about(whole)}, less where attacks end early")
        records: dict[str, Record] = {}
        attacks: dict[str, Any] = {}
        starts = {name: [each for each in member.needs if each in members] for name, member in members.items()}
        with bar(1, "attack") as shown:
            for name in TopologicalSorter(starts).static_order():
                before = sum(forecasts[each] for each in records)

                def show(done: float, what: str, name: str = name, before: float = before) -> None:
                    interrupts.check()
                    shown.set_description_str(f"{name}: {what}", refresh=False)
                    shown.update((before + done * forecasts[name]) / max(whole, 1e-9) - shown.n)

                began = time.perf_counter()
                progress = self._progress(name, records, show)
                records[name] = members[name].run(exposed, own, config.options_of(name), progress)
                seconds = time.perf_counter() - began
                attacks[name] = {**self._judged(records[name]), "seconds": seconds, **records[name].facts}
                self._log.info(f"{name}: {_line(attacks[name]['metrics'])} on unseen images, in {about(seconds)}")
        return {name: records[name] for name in members}, {name: attacks[name] for name in members}

    def _progress(self, name: str, records: Mapping[str, Record], show: Any) -> Progress:
        """For one attack: what it may start from, and all that its numbers depend on."""
        config, member = self.config, self.config.chosen()[name]
        earlier = {each: records[each] for each in member.needs if each in records}
        shared = {each: getattr(config, each) for each in ("queries", "aux_size", "score_size", "seed")}
        options = config.options_of(name).to_dict()
        key = {
            **shared,
            "knowledge": config.knowledge[0],
            "target": self.target.checksum,
            "data": self.target.data_checksum,
            "options": {each: value for each, value in options.items() if each not in member.bounds},
            "earlier": {each: record.checksum for each, record in earlier.items()},
        }
        return Progress(self._log, self.out, key, earlier, show)

    def _judged(self, record: Record) -> dict[str, Any]:
        """What a record is worth: for every metric, the candidate that does best on validation images."""
        candidates: dict[str, Any] = {name: self._scores(guesses) for name, guesses in record.guesses.items()}
        chosen = dict.fromkeys(METRICS, next(iter(candidates)))
        if len(candidates) > 1:
            chosen = {
                metric: best(metric, {name: each[VAL] for name, each in candidates.items()}) for metric in METRICS
            }
        found: dict[str, Any] = {}
        for part in ("metrics", TRAINED):
            if all(part in each for each in candidates.values()):
                rest = {name: value for name, value in candidates[chosen["mse"]][part].items() if name not in METRICS}
                of_identity = candidates[chosen["identified"]][part]
                rest |= {name: of_identity[name] for name in ("chance", "candidates", "median_rank")}
                found[part] = {**{metric: candidates[chosen[metric]][part][metric] for metric in METRICS}, **rest}
        return {**found, "chosen": chosen, "candidates": candidates}

    def _scores(self, guesses: Guesses) -> dict[str, Any]:
        """By set; that of unseen images is called ``metrics``."""
        sets = {
            **{name: images for name, (_, images) in self.target.judged.items()},
            VAL: self.target.splits.attacker_val,
        }
        return {
            "metrics" if name == UNSEEN else name: judged(guess, sets[name])
            for name, guess in guesses.items()
            if len(guess)
        }

    def _check_out(self) -> dict[str, Any] | None:
        """The finished attack in ``out``, if it is this one; ``None`` if there is none yet."""
        path = self.out / "config.yaml"
        if path.exists():
            changed = AttackConfig.from_yaml(path).changed(self.config)
            if changed:
                raise UsageError(
                    f"{self.out} holds an attack under other options: {', '.join(changed)}; choose another --out"
                )
        elif self.out.is_dir():
            found = [each.name for each in self.out.iterdir() if not is_unfinished(each)]
            if foreign := sorted({*found} - {LOCK, LOG}):
                raise UsageError(f"{self.out} holds {foreign[0]}, but no attack; choose another --out")
        path = self.out / "attack.json"
        result = read_json(path, *_RESULT)
        if result is None:
            return None
        target = self.target
        if (result.get("target_checksum"), result.get("data_checksum")) != (target.checksum, target.data_checksum):
            raise UsageError(
                f"{path} is of another best.pt, or of other images, than there are now; remove it or choose --out"
            )
        before = AttackConfig.from_dict(result["config"])
        return None if before.changed(self.config) or self.config.changed(before) else result

    def _pictures(self, result: Mapping[str, Any], records: Mapping[str, Record], class_mean: torch.Tensor) -> None:
        attacks, (n, images) = result["attacks"], self.target.judged[UNSEEN]
        shown = varied(images.subset(range(n)), PICTURES)
        places = (images.indices[:n, None] == shown.indices).int().argmax(0)
        guesses = {name: record.guesses[attacks[name]["chosen"]["mse"]][UNSEEN] for name, record in records.items()}
        guesses = {name: guess[places] for name, guess in {**guesses, CLASS_MEAN: class_mean}.items()}
        kept = keep_pictures(self.out, shown, guesses, result["worst"]["mse"]["attack"])
        rows = {name.replace("_", " "): each for name, each in kept.guesses.items()}
        control = self._control or {"pictures": None}
        if (other := control["pictures"]) and np.array_equal(other.originals, kept.originals):
            rows = {f"{control['run']['name']}: {other.worst}, the worst attack": other.guesses[other.worst], **rows}
        draw = partial(draw_reconstructions, kept.originals, rows)
        draw_or_log(self._log, self.out / "reconstructions.png", draw)
        if curves := [curve for each in attacks.values() for curve in each.get("curves", [])]:
            levels = {name.replace("_", " "): each["metrics"]["mse"] for name, each in result["controls"].items()}
            draw_or_log(self._log, self.out / "curves.png", partial(draw_attack_curves, curves, levels))


def _worst(attacks: Mapping[str, Any], part: str) -> dict[str, dict[str, Any]]:
    """For every metric the attack that leaves its victim worst off."""
    found = {}
    for metric in METRICS:
        name = best(metric, {each: own[part] for each, own in attacks.items()})
        found[metric] = {"attack": name, "value": attacks[name][part][metric]}
    return found


def _line(scores: Mapping[str, float | None]) -> str:
    ssim = "" if scores["ssim"] is None else f"  SSIM {scores['ssim']:.3f}"
    return f"MSE {scores['mse']:.5f}{ssim}  identified {scores['identified']:.1%}"
