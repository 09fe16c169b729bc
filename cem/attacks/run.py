"""Attack a trained run: every attacker, the controls, and the files that say what came of it."""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cem.attacks.config import AttackConfig, parse_attacker
from cem.attacks.control_run import find_control, read_control
from cem.attacks.controls import control_scores
from cem.attacks.decoders import build_decoder
from cem.attacks.fit import FittedDecoder, fit_decoder, reconstruct, score_decoder
from cem.attacks.information import information_report, relative_to
from cem.attacks.metrics import mean_scores, score_images, ssim_window
from cem.attacks.splits import attack_splits, pick, varied
from cem.attacks.white_box import run_white_box
from cem.data import DataSplits, load_data, make_loader
from cem.options import ConfigError
from cem.report.attack_curves import draw_attack_curves
from cem.report.reconstructions import draw_reconstructions
from cem.training import checkpoint, load_run, read_summary, runs
from cem.training.evaluation import collect_features, isolated_random
from cem.training.runlog import run_log, write_json

PICTURES = 10  # images in the grid
INFORMATION_IMAGES = 12_000  # at most, for the information report
SCORED = ("train_target", "test_target")


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
        splits: the four disjoint sets of images.

    Raises:
        ConfigError: an option cannot be used, ``run_dir`` holds no finished run, its data are others now, or
            ``out`` holds another attack.
        CheckpointError: the run's ``best.pt`` is missing or damaged.
        ValueError, OSError: the data cannot be read, or leave nothing for an attacker.
    """

    def __init__(self, run_dir: Path, config: AttackConfig, out: Path | None = None) -> None:
        config.validate()
        self.config = config
        self.run_dir = Path(run_dir)
        summary = read_summary(self.run_dir)
        if summary is None:
            raise ConfigError(f"{self.run_dir} holds no finished run: there is no summary.json")
        self._test_accuracy = summary["test_accuracy"]
        name = "attack" if config.queries == 1 else f"attack-queries{config.queries}"
        self.out = self.run_dir / name if out is None else Path(out)
        self._target_checksum = zlib.crc32((self.run_dir / "best.pt").read_bytes())
        self._control = None if config.control is None else read_control(config.control, self.out.name)
        self.finished = self._check_out()
        self.target, self.model = load_run(self.run_dir, config.device)
        self.model.requires_grad_(False)
        self.device = next(self.model.parameters()).device
        data, everything = self._load_data()
        self._num_classes = data.num_classes
        self.splits = attack_splits(data, everything, aux_size=config.aux_size)
        size = min(len(self.splits.test), len(self.splits.target_train), config.score_size or len(self.splits.test))
        # Scored on images of the target's training set and on images that nobody has seen.
        self.judged = {
            "train_target": pick(self.splits.target_train, size),
            "test_target": pick(self.splits.test, size),
        }

    def run(self) -> dict[str, Any]:
        """Train and score all attackers, draw the pictures, write ``attack.json``.

        Returns:
            Its content. An attack that was finished already is left as it is.

        Whatever ends it early goes to the log and is handed on.

        Raises:
            KeyboardInterrupt: the decoders that were finished are kept; the same call goes on from there.
            AttackDiverged: a decoder's loss is not finite.
        """
        if self.finished is not None:
            return self.finished
        self.out.mkdir(parents=True, exist_ok=True)
        with run_log(self.out, "attack.log") as self._log:
            self.config.to_yaml(self.out / "config.yaml")
            try:
                return self._run()
            except KeyboardInterrupt:
                self._log.warning("interrupted; decoders that were finished are kept, the same command goes on")
                raise
            except Exception as error:
                self._log.error("the attack failed: %s", error)
                raise

    def _run(self) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        sizes = self.splits.sizes()
        self._log.info(
            "attack on %s: %d images to train decoders on, %d to choose among them; %d queries an image; %s",
            self.run_dir, sizes["attacker_train"], sizes["attacker_val"], config.queries,
            runs.device_name(self.device),
        )  # fmt: skip
        fitted = {name: self._attacker(name) for name in config.attackers}
        records = [record for _, record in fitted.values()]
        strongest = min(records, key=lambda record: record["val"]["mse"])
        if not strongest["converged"]:
            self._log.warning(
                "the strongest attacker, %s, had not converged: a longer attack (--max-epochs) would do better",
                strongest["name"],
            )
        controls = self._controls()
        information = self._information()
        control = self._control_run()
        if control is not None:
            information = relative_to(information, control["information"], control["name"])
        result = {
            "run": self._run_facts(),
            "config": config.to_dict(),
            "target_checksum": self._target_checksum,
            "sizes": {**sizes, **{f"scored_{name}": len(images) for name, images in self.judged.items()}},
            "ssim_window": ssim_window(*self.image_shape[1:]),
            "strongest": strongest["name"],
            "most_similar": _most_similar(records),
            "converged": strongest["converged"],
            **{name: strongest[name] for name in SCORED},
            "attackers": records,
            "white_box": self._white_box(),
            "controls": controls,
            "undefended": None if control is None else {name: control[name] for name in ("name", *SCORED)},
            "information": information,
            "seconds": time.perf_counter() - start,
            "peak_memory_bytes": runs.peak_memory(self.device),
            "device": runs.device_name(self.device),
            "versions": runs.versions(),
        }
        self._pictures(fitted[strongest["name"]][0], result)
        write_json(self.out / "attack.json", result)
        for name, what in (("test_target", "unseen images"), ("train_target", "the target's training images")):
            self._log.info("%s: %s", what, _scores_line(result[name]))
        return result

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        channels, height, width = self.splits.test.images.shape[1:]
        return channels, height, width

    def _check_out(self) -> dict[str, Any] | None:
        """The finished attack in ``out``, if it is this one; ``None`` if there is none yet."""
        path = self.out / "config.yaml"
        if path.exists():
            changed = AttackConfig.from_yaml(path).changed(self.config)
            if changed:
                raise ConfigError(
                    f"{self.out} holds an attack under other options: {', '.join(changed)}; choose another --out"
                )
        path = self.out / "attack.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["target_checksum"] != self._target_checksum:
            raise ConfigError(f"{path} is of another best.pt than {self.run_dir} holds now; remove it or choose --out")
        return result

    def _load_data(self) -> tuple[DataSplits, DataSplits]:
        """The data as the target saw it, and all of it."""
        target = self.target
        root = self.config.data_root or target.data_root
        everything = load_data(target.data, root, image_size=target.image_size)
        data = everything
        if target.train_size is not None:
            data = load_data(target.data, root, image_size=target.image_size, train_size=target.train_size)
        # Other data would make the four sets overlap in ways that no index shows.
        before = checkpoint.load(self.run_dir / "best.pt")["data_fingerprint"]
        runs.check_same_data(before, runs.data_fingerprint(data), self.run_dir)
        return data, everything

    def _attacker(self, name: str) -> tuple[FittedDecoder, dict[str, Any]]:
        """Train one decoder and score it, or take what an earlier call left."""
        config, path = self.config, self.out / f"{re.sub('[^A-Za-z0-9]+', '-', name)}.pt"
        decoder_name, loss = parse_attacker(name)
        with isolated_random(config.seed, self.device):
            decoder = build_decoder(decoder_name, self.model.feature_shape, self.image_shape).to(self.device)
        if path.exists():
            content = checkpoint.load(path)
            if content["target_checksum"] == self._target_checksum:
                self._log.info("%s: taken from %s", name, path)
                decoder.load_state_dict(content["decoder"])
                record = content["record"]
                fitted = FittedDecoder(
                    decoder.eval(), *(record[key] for key in ("curve", "best_epoch", "converged", "seconds"))
                )
                return fitted, record
        fitted = fit_decoder(
            self.model, decoder, loss, self.splits, config,
            lambda row: self._log.info(
                "%s  epoch %d of at most %d  lr %.1e  loss %.5f  validation MSE %.5f",
                name, row["epoch"], config.max_epochs, row["lr"], row["train_loss"], row["val_mse"],
            ),
        )  # fmt: skip
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
            **{
                part: mean_scores(score_decoder(self.model, decoder, images, config.queries, config.seed))
                for part, images in (("val", self.splits.attacker_val), *self.judged.items())
            },
        }
        content = {"target_checksum": self._target_checksum, "decoder": decoder.state_dict(), "record": record}
        checkpoint.save(path, content)
        state = "converged" if fitted.converged else "not converged"
        self._log.info(
            "%s: %s after %d epochs; validation %s", name, state, len(fitted.curve), _scores_line(record["val"])
        )
        return fitted, record

    def _white_box(self) -> dict[str, Any] | None:
        config = self.config
        if config.white_box_images == 0:
            return None
        self._log.info("white box: %d images, %d steps", config.white_box_images, config.white_box_steps)
        return dict(
            run_white_box(
                self.model,
                self.splits,
                images=config.white_box_images,
                steps=config.white_box_steps,
                queries=config.queries,
                seed=config.seed,
                device=self.device,
            )
        )

    def _controls(self) -> dict[str, dict[str, dict[str, float | None]]]:
        by_set = {
            name: control_scores(self.splits.attacker_train, images, self._num_classes)
            for name, images in self.judged.items()
        }
        return {
            control: {name: scores[control] for name, scores in by_set.items()}
            for control in ("mean_image", "class_mean")
        }

    def _information(self) -> dict[str, Any]:
        images = pick(self.splits.target_train, min(INFORMATION_IMAGES, len(self.splits.target_train)))
        loader = make_loader(images, self.config.batch_size, shuffle=False)
        features, labels = collect_features(self.model, loader, self.device, self.config.seed, noisy=False)
        return information_report(
            features,
            labels,
            num_classes=self._num_classes,
            noise_std=0.0 if self.target.centralised else self.target.noise_std,
            queries=self.config.queries,
            image_dims=self.splits.test.images[0].numel(),
            var_threshold=self.target.var_threshold,
            feature_shape=self.model.feature_shape,
            sigmoid=self.target.arch.endswith("_sgm"),
            seed=self.config.seed,
        )

    def _control_run(self) -> dict[str, Any] | None:
        """What ``attack.json`` of the control run says, with its name."""
        if self._control is not None:
            return self._control
        return find_control(self.run_dir, self.target, self.config, self.out.name)

    def _run_facts(self) -> dict[str, Any]:
        names = ("data", "arch", "cut_layer", "bottleneck", "surrogate", "lambd", "noise_std", "seed", "epochs")
        options = self.target.to_dict()
        return {
            "name": self.run_dir.resolve().name,
            **{name: options[name] for name in (*names, "train_size")},
            "test_accuracy": self._test_accuracy,
        }

    def _pictures(self, strongest: FittedDecoder, result: dict[str, Any]) -> None:
        shown = varied(self.splits.test, PICTURES)
        guess = reconstruct(self.model, strongest.decoder, shown, self.config.queries, self.config.seed)
        scores = score_images(guess, shown.images.float() / 255)
        ssim = None if scores.ssim is None else scores.ssim.numpy()
        originals, pixels = shown.images.numpy(), (guess * 255).round().byte().numpy()
        np.savez_compressed(
            self.out / "images.npz",
            originals=originals,
            reconstructions=pixels,
            ssim=np.full(len(shown), np.nan) if ssim is None else ssim,
            labels=shown.labels.numpy(),
            indices=shown.indices.numpy(),
        )
        rows = {result["strongest"]: (pixels, ssim)}
        self._draw("reconstructions.png", lambda path: draw_reconstructions(originals, rows, path))
        levels = {name: scores["test_target"]["mse"] for name, scores in result["controls"].items()}
        self._draw("curves.png", lambda path: draw_attack_curves(result["attackers"], levels, path))

    def _draw(self, name: str, draw: Callable[[Path], None]) -> None:
        try:
            draw(self.out / name)
        except Exception:  # whatever goes wrong in a picture must not cost the attack that it shows
            self._log.exception("cannot draw %s; the rest of the attack is complete", name)


def _most_similar(records: list[dict[str, Any]]) -> str | None:
    """The attacker with the highest SSIM on the attacker's validation images: MSE alone misleads."""
    if records[0]["val"]["ssim"] is None:
        return None
    return max(records, key=lambda record: record["val"]["ssim"])["name"]


def _scores_line(scores: dict[str, float | None]) -> str:
    ssim = "" if scores["ssim"] is None else f"  SSIM {scores['ssim']:.3f}"
    return f"MSE {scores['mse']:.5f}  PSNR {scores['psnr']:.2f} dB{ssim}"
