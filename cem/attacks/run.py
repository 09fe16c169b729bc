"""Attack a trained run: every attacker, the controls, and the files that say what came of it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cem.attacks.config import AttackConfig, parse_attacker
from cem.attacks.control_run import find_control, read_control
from cem.attacks.controls import control_scores
from cem.attacks.decoders import build_decoder
from cem.attacks.fit import FittedDecoder, fit_decoder, reconstruct, score_decoder
from cem.attacks.metrics import mean_scores, score_images, ssim_window
from cem.attacks.splits import varied
from cem.attacks.target import Target
from cem.attacks.white_box import run_white_box
from cem.data import ImageSet
from cem.errors import CemError, CheckpointError, UsageError
from cem.files import is_unfinished, read_json, replacing, write_json, writing
from cem.folders import LOCK, Lock, remove_unfinished
from cem.machine import enough
from cem.progress import about, bar
from cem.report.attack_curves import draw_attack_curves
from cem.report.reconstructions import draw_reconstructions
from cem.training import checkpoint, runs
from cem.training.evaluation import isolated_random
from cem.training.runlog import draw_or_log, log_refusal, run_log

BIG = "--batch-size, --aux-size or the widths of --attackers"  # what decides how much memory an attack takes
PICTURES = 10  # images in the grid
LOG = "attack.log"
FEW_IMAGES = 500  # with fewer to learn from, a failed attack says little

_SCORES = {"mse": float, "psnr": None, "ssim": None}
_DECODER: dict[str, Any] = {
    "target_checksum": int,
    "data_checksum": int,
    "decoder": dict,
    "record": {
        **{"name": str, "decoder": str, "loss": str, "parameters": int, "epochs": int, "best_epoch": int},
        **{"converged": bool, "seconds": float, "curve": ({str: float}, ...)},
        **dict.fromkeys(("val", "train_target", "test_target"), _SCORES),
    },
}
"""How a decoder's checkpoint is built, see :func:`cem.training.checkpoint.expect`."""


class Attack:
    """Attacks one trained run and leaves a directory behind.

    Construction reads run and data, so what is wrong with either is known before anything is written.

    Args:
        run_dir: a finished run of ``python -m cem.train``.
        config: the options.
        out: directory for the results; ``run_dir/attack`` if left out, or ``run_dir/attack-queriesR`` for
            ``R > 1`` queries. One that holds the beginning of the same attack is continued.

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
        self.target = Target(run_dir, config)
        self._check_losses()
        self.finished = self._check_out()
        if config.control is None:
            self._control = find_control(self.target, config, name)
        else:
            self._control = read_control(config.control, self.target, config, name)

    def run(self) -> dict[str, Any]:
        """Train and score all attackers, draw the pictures, write ``attack.json``.

        Returns:
            Its content. An attack that was finished already is left as it is.

        Whatever ends it early goes to the log and is handed on.

        Raises:
            KeyboardInterrupt: the decoders that were finished are kept; the same call goes on from there.
            DivergedError: a decoder's loss is not finite.
            UsageError: another process attacks in ``out``.
            MachineError: a file cannot be written, or memory ran out.
        """
        if self.finished is not None:
            return self.finished
        self._seconds_before = 0.0  # of decoders that an earlier call trained
        self._passes, self._costs = _most_passes(self.config), self._costs_of_a_pass()
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        with Lock(self.out), run_log(self.out, LOG) as self._log:
            self.finished = self._check_out()  # another process may have finished it meanwhile
            if self.finished is not None:
                return self.finished
            try:
                with writing(self.out), enough("the attack", BIG):
                    remove_unfinished(self.out)
                    self.config.to_yaml(self.out / "config.yaml")
                    return self._run()
            except KeyboardInterrupt:
                self._log.warning("interrupted; decoders that were finished are kept, the same command goes on")
                raise
            except CemError as error:
                log_refusal(self._log, error, "; decoders that were finished are kept, the same command goes on")
                raise
            except Exception as error:
                self._log.error("the attack failed: %s", error)
                raise

    def _run(self) -> dict[str, Any]:
        config, target, start = self.config, self.target, time.perf_counter()
        sizes = target.splits.sizes()
        known, chosen = sizes["attacker_train"], sizes["attacker_val"]
        self._log.info(
            f"attack on {target.run_dir}: {known} images to train decoders on, {chosen} to choose among them; "
            f"{', '.join(config.attackers)}, at most {self._passes} epochs each; white box on "
            f"{config.white_box_images} images; queries an image: {config.queries}; {runs.device_name(target.device)}"
        )
        for note in target.notes:
            self._log.info(note)
        if known < FEW_IMAGES:
            self._log.warning(f"{known} images make a weak attacker; train the target with --train-size to leave more")
        with bar(self._passes * sum(self._costs.values()), "decoders") as self._bar:
            fitted = {name: self._attacker(name) for name in config.attackers}
        records = [record for _, record in fitted.values()]
        strongest = min(records, key=lambda record: record["val"]["mse"])
        for record in records:
            if not record["converged"]:
                self._log.warning("%s had not converged; %s", record["name"], longer(record, config))
        control = self._control
        result = {
            "run": target.facts(),
            "config": config.to_dict(),
            "target_checksum": target.checksum,
            "data_checksum": target.data_checksum,
            "sizes": {**sizes, **{f"scored_{name}": len(images) for name, images in target.judged.items()}},
            "ssim_window": ssim_window(*target.image_shape[1:]),
            "strongest": strongest["name"],
            "most_similar": _most_similar(records),
            "converged": strongest["converged"],
            **{name: strongest[name] for name in target.judged},
            "attackers": records,
            "white_box": self._white_box(fitted[strongest["name"]][0]),
            "controls": control_scores(target.splits.attacker_train, target.judged, target.num_classes),
            "undefended": control
            and {"name": control["run"]["name"], **{name: control[name] for name in target.judged}},
            "information": target.information(config),
            "seconds": time.perf_counter() - start + self._seconds_before,
            **runs.origin(target.device),
        }
        self._pictures(fitted[strongest["name"]][0], result)
        write_json(self.out / "attack.json", result)
        for name, what in (("test_target", "unseen images"), ("train_target", "the target's training images")):
            self._log.info("%s: %s", what, _scores_line(result[name]))
        return result

    def _check_losses(self) -> None:
        """Refuse a loss that is not defined for these images before anything is trained."""
        if ssim_window(*self.target.image_shape[1:]) is None and any(
            parse_attacker(name)[1] == "ssim" for name in self.config.attackers
        ):
            raise UsageError(f"--attackers: there is no SSIM for images of {self.target.image_shape[1:]} pixels")

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
        result = read_json(path, "attackers", "strongest", "config", "sizes")
        if result is None:
            return None
        target = self.target
        if (result.get("target_checksum"), result.get("data_checksum")) != (target.checksum, target.data_checksum):
            raise UsageError(
                f"{path} is of another best.pt, or of other images, than there are now; remove it or choose --out"
            )
        return result

    def _attacker(self, name: str) -> tuple[FittedDecoder, dict[str, Any]]:
        """Train one decoder and score it, or take what an earlier call left."""
        config, target, path = self.config, self.target, self.out / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.pt"
        decoder_name, loss = parse_attacker(name)
        with isolated_random(config.seed, target.device):
            decoder = build_decoder(decoder_name, target.model.feature_shape, target.image_shape).to(target.device)
        checksums = {"target_checksum": target.checksum, "data_checksum": target.data_checksum}
        record = self._left(path, checksums, decoder)
        if record is not None:
            self._log.info("%s: taken from %s", name, path)
            self._seconds_before += record["seconds"]
            kept = (record[key] for key in ("curve", "best_epoch", "converged", "seconds"))
            self._shorter(self._passes * self._costs[name])
            return FittedDecoder(decoder.eval(), *kept), record
        began = time.perf_counter()

        def report(row: Mapping[str, float]) -> None:
            self._bar.update(self._costs[name])
            self._bar.set_description_str(f"{name}, epoch {row['epoch']}/{self._passes}")
            self._log.info(
                f"{name}  epoch {row['epoch']} of at most {config.max_epochs}  lr {row['lr']:.1e}  "
                f"loss {row['train_loss']:.5f}  validation MSE {row['val_mse']:.5f}"
            )
            if row["epoch"] == 1 and name == config.attackers[0]:
                cost = self._costs[name]
                left = (time.perf_counter() - began) * (self._passes * sum(self._costs.values()) / cost - 1)
                self._log.info("decoders take about %s, less where they converge early", about(left))

        fitted = fit_decoder(target.model, decoder, loss, target.splits, config, report)
        self._shorter((self._passes - len(fitted.curve)) * self._costs[name])
        record = {
            "name": name,
            "decoder": decoder_name,
            "loss": loss,
            "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
            "epochs": len(fitted.curve),
            "best_epoch": fitted.best_epoch,
            "converged": fitted.converged,
            "seconds": fitted.seconds,
            "curve": fitted.curve,
            **self._scores(decoder, {"val": target.splits.attacker_val, **target.judged}),
        }
        checkpoint.save(path, {**checksums, "decoder": decoder.state_dict(), "record": record})
        state = "converged" if fitted.converged else "not converged"
        self._log.info(f"{name}: {state} after {len(fitted.curve)} epochs; validation {_scores_line(record['val'])}")
        return fitted, record

    def _shorter(self, work: float) -> None:
        """Take what a decoder had no need of off the bar."""
        self._bar.total = (self._bar.total or 0) - work

    def _costs_of_a_pass(self) -> dict[str, int]:
        """By decoder, relative to the others and roughly: what is to do grows with its parameters."""
        costs = {}
        for name in self.config.attackers:
            with torch.device("meta"):
                decoder = build_decoder(
                    parse_attacker(name)[0], self.target.model.feature_shape, self.target.image_shape
                )
            # A pass costs something however small the decoder is.
            costs[name] = 30_000 + sum(parameter.numel() for parameter in decoder.parameters())
        return costs

    def _scores(self, decoder: nn.Module, sets: Mapping[str, ImageSet]) -> dict[str, Any]:
        """Mean scores of a decoder on sets of images, by their names."""
        model, config = self.target.model, self.config
        return {
            name: mean_scores(score_decoder(model, decoder, images, config.queries, config.seed))
            for name, images in sets.items()
        }

    def _left(self, path: Path, checksums: dict[str, int], decoder: nn.Module) -> dict[str, Any] | None:
        """What an earlier call left in ``path``, if it was trained against this target on these images.

        Its weights go into ``decoder``, and its record is returned.
        """
        if not path.exists():
            return None
        try:
            content = checkpoint.load(path, _DECODER)
            if any(content[name] != value for name, value in checksums.items()):
                return None
            checkpoint.load_state(decoder, content, "decoder", path)
        except CheckpointError as error:
            self._log.warning("%s; training it again", error)
            return None
        record: dict[str, Any] = content["record"]
        return record

    def _white_box(self, strongest: FittedDecoder) -> dict[str, Any] | None:
        """The white-box attack on the first images that decoders are scored on, and the strongest decoder on those."""
        config, target = self.config, self.target
        if config.white_box_images == 0:
            return None
        self._log.info("white box: %d images, %d steps", config.white_box_images, config.white_box_steps)
        found = run_white_box(
            target.model, target.splits, images=config.white_box_images, steps=config.white_box_steps,
            queries=config.queries, seed=config.seed, device=target.device,
        )  # fmt: skip
        same = {name: images.subset(range(found["images"])) for name, images in target.judged.items()}
        return {**found, "decoder": self._scores(strongest.decoder, same)}

    def _pictures(self, strongest: FittedDecoder, result: dict[str, Any]) -> None:
        shown = varied(self.target.splits.test, PICTURES)
        guess = reconstruct(self.target.model, strongest.decoder, shown, self.config.queries, self.config.seed)
        scores = score_images(guess, shown.images.float() / 255)
        ssim = None if scores.ssim is None else scores.ssim.numpy()
        originals, pixels = shown.images.numpy(), (guess * 255).round().byte().numpy()
        kept: dict[str, Any] = {"labels": shown.labels.numpy(), "indices": shown.indices.numpy()}
        kept["ssim"] = np.full(len(shown), np.nan) if ssim is None else ssim
        with replacing(self.out / "images.npz") as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, originals=originals, reconstructions=pixels, **kept)
        rows = {result["strongest"]: (pixels, ssim)}
        draw_or_log(self._log, self.out / "reconstructions.png", partial(draw_reconstructions, originals, rows))
        levels = {
            f"{name.replace('_', ' ')}, unseen images": scores["test_target"]["mse"]
            for name, scores in result["controls"].items()
        }
        draw_or_log(self._log, self.out / "curves.png", partial(draw_attack_curves, result["attackers"], levels))


def _most_passes(config: AttackConfig) -> int:
    """The length of all whole cycles, each twice as long as the one before, that ``max_epochs`` leaves room for."""
    length = min(config.cycle_epochs, config.max_epochs)
    passes = 0
    while passes + length <= config.max_epochs:
        passes, length = passes + length, 2 * length
    return passes


def longer(record: dict[str, Any], config: AttackConfig) -> str:
    """What would let a decoder converge: the bound that leaves room for one more cycle, twice as long as the last."""
    done = max(record["epochs"], config.cycle_epochs)
    return f"--max-epochs {2 * done + config.cycle_epochs} would give it another cycle"


def _most_similar(records: list[dict[str, Any]]) -> str | None:
    """The attacker with the highest SSIM on the attacker's validation images: MSE alone misleads."""
    if records[0]["val"]["ssim"] is None:
        return None
    return max(records, key=lambda record: record["val"]["ssim"])["name"]


def _scores_line(scores: dict[str, float | None]) -> str:
    ssim = "" if scores["ssim"] is None else f"  SSIM {scores['ssim']:.3f}"
    return f"MSE {scores['mse']:.5f}  PSNR {scores['psnr']:.2f} dB{ssim}"
