"""Training runs: epochs, evaluation, checkpoints, interruption and bit-exact resume."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnm import checkpoint, metrics, plot
from cnm.config import Config
from cnm.data import Batch, BatchLoader, Split, open_split
from cnm.data.data_dir import with_data_dir
from cnm.data.expected import origin_of
from cnm.data.fingerprint import difference
from cnm.data.origin import Origin
from cnm.distributed import Group
from cnm.errors import InputError
from cnm.evaluation import Evaluation, check_vocabulary, evaluate
from cnm.files import replace_file
from cnm.masking import sample_masked_words
from cnm.models import build
from cnm.precision import NAMES, compute_dtype, products_of
from cnm.training.cuda_graph import GraphedStep
from cnm.training.memory import keep_freed_memory
from cnm.training.progress import Progress
from cnm.training.resumed import bring_up_to_date, check_same_data, resumed_config, with_vocabulary_size
from cnm.training.run_folder import RunFolder
from cnm.training.steps import STEP_NAMES, make_step
from cnm.training.stop_signal import StopSignal

LOG_EVERY = 20  # updates per metrics row; only then does the host wait for the device
SAVE_SECONDS = 300.0  # between two checkpoints within an epoch
PICTURED_SENTENCES = 6  # of the test split, in the picture refreshed after each epoch


class Interrupted(Exception):
    """A signal ended the run after its state was saved."""

    def __init__(self, signum: int, saved: Path) -> None:
        super().__init__(f"interrupted; continue with `cnm train --resume {saved.parent}`")
        self.signum = signum


@dataclass(frozen=True)
class Result:
    """The result of a run: scores of the chosen checkpoint on the test split, and of baselines without a video.

    Attributes:
        checkpoint: the chosen file.
        epoch: its epoch, counted from 1.
        scores: keyed by ``cnm.metrics.SCORES``; empty, as ``baselines``, without a test split that has moments.
        baselines: scores by name of the baseline.
    """

    checkpoint: Path
    epoch: int
    scores: dict[str, float]
    baselines: dict[str, dict[str, float]]


class Trainer:
    """One training run in one folder.

    The best checkpoint is chosen on a validation split that is not the test split. Where there is none (the published
    Charades-STA files validate on the test file) nothing is chosen: the last epoch is the result. Training reads no
    moments; splits without them are not scored.

    Args:
        config: what to train; with ``resume`` None means as stored, and only ``resumed.RESUMABLE_CHANGES`` may differ.
        folder: where the run's files go: a new folder, or with ``resume`` the run to continue.
        device: where to train.
        precision: of activations, "float32" or "bf16"; parameters, their gradients, optimizer states, losses and
            statistics are float32 either way. "high": float32 with faster products, see ``cnm.precision``. None: as the
            resumed run; a new one computes in float32.
        step: one of ``cnm.training.steps.STEP_NAMES``. None: as the resumed run, or lean.
        skip_nonfinite: leave out updates whose loss or gradients are not finite, and count them in the metrics, instead
            of ending the run. On GPUs this waits for every update and uses no CUDA graph. None: as the resumed run; a
            new one ends.
        log_every: updates per metrics row.
        quiet: show no progress.
        data_dir: with ``resume``, the folder that the data's relative paths start from now.
        group: processes that train together, see ``cnm.distributed``; each makes a trainer, process 0's writes.

    Raises:
        InputError: a file or value is wrong; nothing has been written then.
    """

    def __init__(
        self,
        config: Config | None,
        folder: str | Path,
        *,
        resume: bool = False,
        device: torch.device | str = "cpu",
        precision: str | None = None,
        step: str | None = None,
        skip_nonfinite: bool | None = None,
        log_every: int = LOG_EVERY,
        quiet: bool = False,
        data_dir: Path | None = None,
        group: Group | None = None,
    ) -> None:
        self.group = group
        self.writes = group is None or group.rank == 0
        quiet = quiet or not self.writes
        self.run = RunFolder(folder)
        self.device = torch.device(device)
        self.log_every = log_every
        self.quiet = quiet
        self.saved: dict[str, Any] | None = None
        if resume:
            self.run.check_resumable()
            self.saved = checkpoint.load(self.run.last)
            if self.saved.get("training") is None or self.saved.get("vocabulary") is None:
                raise InputError(f"{self.run.last}: holds a model alone, not the state of a run; it cannot be resumed")
            stored = Config.from_json(self.saved["config"], f"{self.run.last}: config")
            stored = with_data_dir(stored, data_dir, stored=True)
            given = None if config is None else with_data_dir(config, data_dir, stored=True)
            config = stored if given is None else resumed_config(stored, given)
        elif config is None:
            raise TypeError("Trainer: config is needed for a new run")
        elif self.writes:
            self.run.check_new()

        self.options: dict[str, Any] = {
            "precision": self._choice("precision", precision, "float32", NAMES),
            "step": self._choice("step", step, "lean", STEP_NAMES),
            "skip_nonfinite": skip_nonfinite
            if skip_nonfinite is not None
            else self._stored_option("skip_nonfinite", False),
        }

        progress = not quiet
        narrow = compute_dtype(self.options["precision"])
        self.dtype = narrow or torch.float32  # of the frames that are read
        if self.saved is None:
            self.origin = origin_of(config.dataset, "train")
        else:
            self.origin = Origin.from_record(self.saved.get("features"))
        opened: dict[str, Any] = {"progress": progress, "dtype": self.dtype, "origin": self.origin}
        self.train_split = open_split(config.dataset, "train", **opened)
        dataset = config.dataset
        has_test = dataset.dataset == "synthetic" or dataset.test_data is not None
        self.test_split = open_split(dataset, "test", **opened) if has_test else None
        self.val_split = self._open_val(config, opened)
        self.chooses_best = self.val_split is not None and self.val_split is not self.test_split

        self.fingerprints = {split.name: split.fingerprint() for split in self.splits}
        self.config = config if resume else with_vocabulary_size(config, len(self.train_split.vocabulary))
        train = self.config.train
        torch.manual_seed(train.seed)
        self.model = build(self.config).to(self.device)
        self.model.compute_dtype = narrow
        self.step = make_step(self.options["step"], self.model, self.config)
        self.step.group = group
        self.model.seed_shift = 0 if group is None else group.rank
        self.step.skip_nonfinite = self.options["skip_nonfinite"]
        graphs = self.device.type == "cuda" and group is None and not self.step.skip_nonfinite
        self.run_step = GraphedStep(self.step) if graphs else self.step
        part = None if group is None else group.rows
        self.loader = BatchLoader(self.train_split, train.batch_size, shuffle=True, seed=train.seed, part=part)
        self.epoch = 0  # the one under way, counted from 0
        self.batch = 0  # batches of it that are done; all of them: its evaluation is due
        self.seconds = 0.0  # of training so far
        self.epoch_began = 0.0  # the same, when the epoch under way began
        self.best: dict[str, Any] = {}  # epoch and score of best.pt
        self.rows = 0  # in metrics.jsonl
        self.metric_names: list[str] = []
        self.pending: list[torch.Tensor] = []  # metrics of updates since the last row
        self.stop_signal = StopSignal(quiet=quiet, several=group is not None)
        self.random = self._random_state()  # others may draw before train()
        if self.saved is not None:
            self._restore(self.saved)

    def _choice(self, name: str, wanted: str | None, default: str, known: Collection[str]) -> str:
        """Returns the wanted option; a resumed run must keep its own, since it continues bit for bit."""
        if wanted is not None and wanted not in known:
            raise InputError(f"{name} {wanted!r}: unknown; choose one of {', '.join(known)}")
        if self.saved is None:
            return wanted or default
        stored = str(self._stored_option(name, default))
        if stored not in known:
            raise InputError(
                f"{self.run.last}: its {name} {stored!r} is unknown to this version of cnm; resume it with the "
                f"one it was trained with"
            )
        if wanted not in (None, stored):
            raise InputError(
                f"{self.run.path}: was trained with {name} {stored}, not {wanted}; leave the option out, or start a "
                f"new run"
            )
        return stored

    def _stored_option(self, name: str, default: Any) -> Any:
        return default if self.saved is None else self.saved["training"].get("options", {}).get(name, default)

    @property
    def splits(self) -> list[Split]:
        """The splits in use, each once."""
        val = self.val_split if self.chooses_best else None
        return [split for split in (self.train_split, val, self.test_split) if split is not None]

    def train(self) -> Result:
        """Trains to the last epoch and scores the result on the test split.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run is saved. A second signal raises KeyboardInterrupt at once.
            InputError: a checkpoint or metrics row could not be written, or the loss is no longer finite.
        """
        epochs = self.config.train.max_num_epochs
        keep_freed_memory()
        lock = self.run.locked() if self.writes else nullcontext()
        with lock, products_of(self.options["precision"]):
            if self.group is not None:
                found = {
                    "updates": self.step.num_updates,
                    "epochs": self.epoch,
                    "batches of the epoch": self.batch,
                    "sentences": len(self.train_split),
                    "words": len(self.train_split.vocabulary),
                    "splits": ", ".join(self.fingerprints),
                    "precision": self.options["precision"],
                }
                self.group.check_same(found, str(self.run.path))
                self._check_same_data(self.group)
            if self.saved is None and self.writes:
                self.run.check_new()
                self.run.create(self.config)
            if self.saved is not None:
                if self.writes:
                    self._check_still_last(self.saved)
                    self.run.clean()
                    self.rows = self.run.keep_rows(self.rows)
                    bring_up_to_date(self.run, self.saved, self.config, self.rows)
                self.saved = None
            self._restore_random_state(self.random)
            self.progress = Progress(epochs * len(self.loader), self.step.num_updates, quiet=self.quiet)
            self.events = _event_writer(self.run.events, self.step.num_updates) if self.writes else None
            self.last_save = time.monotonic()
            if self.group is not None:
                self.group.share_parameters(self.model)
            try:
                with self.stop_signal.listening():
                    while self.epoch < epochs:
                        self._train_epoch()
                        self._finish_epoch()
                    return self._result()
            finally:
                self.progress.close()
                if self.events is not None:
                    self.events.close()

    def _train_epoch(self) -> None:
        self.model.train()
        self.step.begin_epoch(self.epoch + 1)
        if self.batch == 0:
            self.epoch_began = self.seconds
        name = f"epoch {self.epoch + 1}/{self.config.train.max_num_epochs}"
        self.row_started, self.row_samples = time.monotonic(), 0
        for indices, batch in self.loader.epoch(self.epoch, self.batch):
            rate = self.step.learning_rate
            found = self._update(indices, batch.to(self.device, non_blocking=True))
            self.metric_names = list(found)
            self.pending.append(torch.stack([value.float() for value in found.values()]))
            self.row_samples += len(indices)
            self.batch += 1
            figures = None
            if self.step.num_updates % self.log_every == 0 or self.batch == len(self.loader):
                figures = self._log(rate)
            self.progress.advance(name, figures)
            if time.monotonic() - self.last_save > SAVE_SECONDS:
                self._save()
            self._check_stop(logged=figures is not None)

    def _update(self, indices: np.ndarray, batch: Batch) -> dict[str, torch.Tensor]:
        """One step on one batch, or on this process's part of it."""
        if self.group is None:
            return self.run_step(batch)
        # Words are drawn for the whole batch, as one process would.
        size, L = len(indices), batch.mask_weights.size(1)
        rows = torch.from_numpy(self.group.rows(size)).to(self.device)
        noises = [torch.empty(size, L, device=self.device).exponential_()[rows] for _ in range(self.step.draws)]
        masks = [
            sample_masked_words(batch.mask_weights, batch.word_lengths, exponential_noise)
            for exponential_noise in noises
        ]
        self.step.share = self.group.share(size)
        return self.step(batch, masked_words=masks)

    def _log(self, rate: float) -> dict[str, str]:
        """One metrics row: means over the updates since the last one. Returns the figures for the progress display.

        None where all of a short row's updates were skipped: they count in the next one.
        """
        finite = self._finite_pending()
        now = time.monotonic()
        elapsed, self.row_started = now - self.row_started, now
        self.seconds += elapsed
        speed = self.row_samples / max(elapsed, 1e-9)
        self.row_samples = 0
        if len(finite) == 0:
            return {}
        skipped = len(self.pending) - len(finite)
        self.pending.clear()
        losses = dict(zip(self.metric_names, finite.mean(0).tolist(), strict=True))
        if self.step.skip_nonfinite:
            losses["skipped"] = skipped
        self._append(
            "train", losses | {"learning_rate": rate, "samples_per_second": round(speed, 2)}, time=self.seconds
        )
        return {
            **{name: f"{losses[metric]:.3f}" for name, metric in self.step.figures.items()},
            "lr": f"{rate:.1e}",
            "samples/s": f"{speed:.0f}",
        }

    def _finite_pending(self) -> torch.Tensor:
        """Metrics [updates, names] since the last row, on the host, which waits for the device here.

        Raises:
            InputError: one of them is not finite; or, where such updates are skipped, all of a row's were. What was
                last saved was saved before.
        """
        values = torch.stack(self.pending).cpu()
        broken = (~values.isfinite()).nonzero()
        finite = values[values.isfinite().all(1)]
        goes_on = self.step.skip_nonfinite and (len(finite) > 0 or len(values) < self.log_every)
        if len(broken) and not goes_on:
            row, column = broken[0].tolist()
            ago = len(values) - 1 - row
            place = f"epoch {self.epoch + 1}, batch {self.batch - ago}" if ago < self.batch else "an epoch before"
            rates = " and ".join(f"train.{name}.lr" for name in self.step.optimizers)
            raise InputError(
                f"{self.run.path}: {self.metric_names[column]} became {values[row, column].item()} in update "
                f"{self.step.num_updates - ago} ({place}); lower {rates}, or lengthen the warmup_updates there"
            )
        return finite

    def _finish_epoch(self) -> None:
        """Evaluation, checkpoints and pictures after an epoch's last update."""
        if self.group is not None:  # whose processes do not stop in an evaluation, and may be killed in a long one
            self._save()
        score = None
        seconds = self.seconds - self.epoch_began
        trained = f"epoch {self.epoch + 1}: {seconds:.1f} s of training"
        if self.val_split is not None:
            scores = self._evaluate(self.val_split).scores
            score = scores["mIoU"]
            self._append("eval", scores, split=self.val_split.name, epoch_seconds=seconds)
            self.progress.say(
                f"{trained}; {self.val_split.name} mIoU {score:.4f}, "
                f"R@1 {' / '.join(f'{scores[name]:.4f}' for name in metrics.SCORES[1:4])} at IoU 0.3 / 0.5 / 0.7"
            )
        else:
            self._append("epoch", {"epoch_seconds": seconds})
            self.progress.say(trained)
        if self.chooses_best and score is not None and score > self.best.get("mIoU", -1.0):
            self.best = {"epoch": self.epoch + 1, "mIoU": score}
            if self.writes:
                checkpoint.save(self.run.best, self._model_state() | {"epoch": self.best["epoch"]})
        self.epoch += 1
        self.batch = 0
        self._save()
        self._draw()

    def _result(self) -> Result:
        """Scores of the best checkpoint, or the last where none is chosen, on the test split."""
        path, epoch = self.run.last, self.epoch
        if self.group is not None:
            self.group.gather(None)  # process 0 has written the checkpoint by now
        if self.chooses_best and self.best:
            path = self.run.best
            epoch = self.best["epoch"]
            if self.writes:
                best = checkpoint.load(path)  # other machines need not have it
                epoch = best.get("epoch", epoch)  # a kill may have left it ahead of last.pt
                self.model.load_state_dict(best["model_parameters"])
            if self.group is not None:
                self.group.share_parameters(self.model)
        scores, baselines, of = {}, {}, {}
        if self.test_split is not None and self.test_split.scored:
            scores = self._evaluate(self.test_split, self._check_stop_of_result).scores
            baselines = metrics.baselines(self.test_split.windows, moments=self.model.num_proposals)
            of = {"split": self.test_split.name}
        skips = self.step.skip_nonfinite and self.pending  # those of a last row that has no other updates
        skipped = {"skipped": len(self.pending)} if skips else {}
        self._append("result", {"checkpoint": path.name, **skipped, **scores}, epoch=epoch, **of)
        self._draw()
        return Result(path, epoch, scores, baselines)

    def _evaluate(self, split: Split, check_stop: Callable[[], None] | None = None) -> Evaluation:
        check = (check_stop or self._check_stop) if self.group is None else None
        return evaluate(self.model, split, self.config.train.batch_size, check=check, group=self.group)

    def _append(self, kind: str, values: dict[str, Any], *, epoch: int | None = None, **also: Any) -> None:
        """Adds a row to metrics.jsonl and, where tensorboard is installed, to its events."""
        place = {"kind": kind, "epoch": epoch or self.epoch + 1, "update": self.step.num_updates}
        self.rows += 1
        if self.writes:
            self.run.append(place | also | values)
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self.events.add_scalar(f"{also.get('split', kind)}/{name}", value, self.step.num_updates)

    def _draw(self) -> None:
        """Refreshes the run's pictures."""
        if not self.writes:
            return
        replace_file(self.run.pictures / "learning_curves.png", plot.learning_curves(self.run.rows()))
        split = self.test_split or self.train_split
        count = min(PICTURED_SENTENCES, len(split))
        indices = np.linspace(0, len(split) - 1, count).astype(int)
        batch = split.batch(indices).to(self.device)
        self.model.eval()
        found = self.model.proposals(batch)
        items = [
            plot.Localization.of(self.model, found, row, sample.sentence, sample.duration, sample.windows)
            for row, sample in enumerate(split.samples[int(index)] for index in indices)
        ]
        replace_file(self.run.pictures / "localizations.png", plot.localizations(items))

    def _model_state(self) -> dict[str, Any]:
        return {
            **({} if self.origin is None else {"features": self.origin.to_dict()}),
            "num_updates": self.step.num_updates,
            "config": self.config.to_dict(),
            "model_parameters": self.model.state_dict(),
            "vocabulary": self.train_split.vocabulary.state(),
        }

    def _save(self) -> None:
        self.last_save = time.monotonic()
        if self.pending and not self.step.skip_nonfinite:  # which leaves the parameters finite
            self._finite_pending()
        if not self.writes:
            return
        training = {
            "options": self.options,
            "step": self.step.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "epoch_began": self.epoch_began,
            "best": self.best,
            "rows": self.rows,
            "fingerprints": self.fingerprints,
            "metric_names": self.metric_names,
            "pending": [values.cpu() for values in self.pending],
            "random": self._random_state(),
        }
        checkpoint.save(self.run.last, self._model_state() | {"training": training})
        self.last_save = time.monotonic()

    def _restore(self, saved: dict[str, Any]) -> None:
        vocabulary = self.train_split.vocabulary
        check_vocabulary(self.model, vocabulary, type(vocabulary).from_state(saved["vocabulary"]))
        check_same_data(saved["training"].get("fingerprints", {}), self.fingerprints, self.run.last)
        try:
            training = saved["training"]
            self.model.load_state_dict(saved["model_parameters"])
            self.step.load_state_dict(training["step"])
            self.random = self.random | training["random"]  # a GPU's may be new
            torch.Generator().set_state(self.random["torch"])  # raises where it is none
            self.epoch, self.batch, self.seconds = training["epoch"], training["batch"], training["seconds"]
            if self.batch > len(self.loader):
                raise ValueError(f"batch {self.batch} of an epoch of {len(self.loader)}")
            self.epoch_began = training.get("epoch_began", 0.0)
            self.best, self.rows, self.metric_names = training["best"], training["rows"], training["metric_names"]
            self.pending = [values.to(self.device) for values in training["pending"]]
            if not self.step.skip_nonfinite:  # those of updates that were skipped
                self.pending = [values for values in self.pending if values.isfinite().all()]
        except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
            detail = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.run.last}: its training state does not fit this version of cnm ({detail})"
            ) from None
        begun, wanted = self.epoch + (self.batch > 0), self.config.train.max_num_epochs
        if wanted < begun:
            raise InputError(
                f"{self.run.path}: has trained in epoch {begun}, so train.max_num_epochs cannot be {wanted}; give "
                f"{begun} or more"
            )
        if self.writes and self.chooses_best and self.best and not self.run.best.is_file():
            raise InputError(f"{self.run.best}: is not there, the best model of this run so far; copy it there too")

    def _random_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _restore_random_state(self, random: dict[str, Any]) -> None:
        torch.set_rng_state(random["torch"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)

    def _open_val(self, config: Config, opened: dict[str, Any]) -> Split | None:
        """The split that epochs are scored on; None where there is none with moments."""
        dataset = config.dataset
        if dataset.dataset != "synthetic":
            if dataset.val_data is None:
                return None
            if dataset.test_data is not None and os.path.realpath(dataset.val_data) == os.path.realpath(
                dataset.test_data
            ):
                return self.test_split if self.test_split is not None and self.test_split.scored else None
        split = open_split(dataset, "val", **opened)
        return split if split.scored else None

    def _check_stop(self, *, logged: bool = True) -> None:
        """Saves and stops if a signal asked for it; processes that train together do so after the same update.

        A signal may come at any moment here, and before or after the other processes hear of it: what counts is what
        all of them agreed on, so that none stops alone.
        """
        asked = self.stop_signal.received
        if self.group is not None:
            if self.device.type == "cuda" and not logged:  # a GPU is not waited for after every update
                return
            asked = (asked or signal.SIGTERM) if self.group.any(asked is not None, self.device) else None
        if asked is not None:
            self._save()
            if self.group is not None:
                self.group.gather(None)  # torchrun ends all once one leaves: process 0 has written by now
            raise Interrupted(asked, self.run.last)

    def _check_stop_of_result(self) -> None:
        """Stops if a signal asked for it. The last epoch's state is saved; the model may be the best by now."""
        if self.stop_signal.received is not None:
            raise Interrupted(self.stop_signal.received, self.run.last)

    def _check_same_data(self, group: Group) -> None:
        """Raises ``InputError`` where a process of the job, on another machine perhaps, reads other data."""
        for rank, others in enumerate(group.gather(self.fingerprints)):
            for name, mine in self.fingerprints.items():
                other = difference(mine, others[name])
                if other is not None:
                    raise InputError(
                        f"{self.run.path}: process {rank} of the job has {other} in the {name} split, unlike process "
                        f"{group.rank}; give all machines the same files"
                    )

    def _check_still_last(self, saved: dict[str, Any]) -> None:
        """Raises ``InputError`` where another process trained on between the reading of the checkpoint and the lock."""
        now = checkpoint.load(self.run.last)
        if (now["num_updates"], now["training"]["rows"]) != (saved["num_updates"], saved["training"]["rows"]):
            raise InputError(f"{self.run.path}: another process trained on in this folder meanwhile; resume once more")


def _event_writer(folder: Path, updates: int) -> Any:
    """TensorBoard's writer, events after ``updates`` dropped; None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=updates + 1)
