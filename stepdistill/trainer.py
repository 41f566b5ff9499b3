"""The training loop, on accelerate. It knows players, turns and losses by name, and no method's mathematics.

Several processes share each update's batch: every one computes its rows, gradients are averaged, and all take the same
optimizer step. The draws of a batch depend on a row's global index alone, so a run does not depend on their number.
"""

import itertools
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from stepdistill import checkpoint, float32
from stepdistill.audit import rehearse
from stepdistill.data.batch import Batch
from stepdistill.denoiser import Denoiser
from stepdistill.distributed import Processes, join
from stepdistill.eval.row_cache import cache_folder
from stepdistill.evaluation import BEST, Evaluation, ranked
from stepdistill.exporting.export import export
from stepdistill.exporting.first_call import check_stock_call
from stepdistill.faults import explained
from stepdistill.final_report import can_report, write_report
from stepdistill.finite import FiniteWatch
from stepdistill.forward import forward_passes
from stepdistill.generation.preview import Preview
from stepdistill.moving_average import MovingAverage
from stepdistill.optimizer import learning_rate, make_optimizer, only_moving
from stepdistill.parts import is_shard
from stepdistill.progress import TrainingProgress, quiet, say
from stepdistill.recipe import Recipe, load
from stepdistill.run_folder import check_grid, keep_lines_before, prepare_folder
from stepdistill.selfcheck import check_conventions
from stepdistill.session import Session, build
from stepdistill.sharding import Shards, clip_gradients, share_out
from stepdistill.watchdog import Watchdog, heartbeat
from stepdistill.zero import ZeroOptimizer, as_launched, partition


@dataclass(frozen=True)
class RunResult:
    """What :func:`train` leaves: the run folder, the last finished step, and the report's path if one was made."""

    folder: Path
    step: int
    interrupted: bool = False
    report: Path | None = None


def train(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = (), safe: bool = False) -> RunResult:
    """Distil as the recipe says; afterwards export the student and write the report.

    Args:
        recipe: a file, a shipped recipe's name, nested dicts, or a loaded Recipe.
        overrides: ``dotted.key=value``. safe: refuse a recipe that names Python code.

    Raises:
        InputError: the recipe, the teacher or the data are not usable; the same folder takes the corrected recipe.
        stepdistill.finite.NonFiniteError: training diverged; the last checkpoint is intact.
        RunError: memory or disk ran out; so is it then.
    """
    recipe = load(recipe, overrides, safe)
    with explained(Path(recipe.output), recipe):
        return _train(recipe, safe)


def _train(recipe: Recipe, safe: bool) -> RunResult:
    folder = Path(recipe.output)
    tracker = None if recipe.train.tracker == "none" else recipe.train.tracker
    accelerator = join(log_with=tracker, project_dir=str(folder))
    processes = Processes(accelerator)
    recipe = as_launched(recipe, accelerator, safe)
    if not processes.first:
        quiet()
    processes.share(recipe.train.batch_size, recipe.train.accumulation)
    start = processes.once(lambda: prepare_folder(folder, recipe, safe))
    step, report = 0, None
    try:
        shared, shards = recipe.distributed.weights and processes.count > 1, Shards()
        with accelerator.main_process_first():  # the others find what it has cached
            session = build(recipe, accelerator.device, cache=cache_folder(), shared=shared)
        times = [step.t for step in session.sampler.grid()]
        processes.once(lambda: check_grid(folder, times, session.sampler.scheduler, resumes=start is not None))
        if start is None:
            # Before networks are sharded: the pipeline's own is called, and weights are measured.
            processes.once(lambda: check_stock_call(session))
            rehearse(recipe, session.method, session.trace.denoiser.kind, len(session.conditioning))
        if shared:
            if recipe.distributed.shard:
                shards = share_out(session.method, session.batch(0, 0, 1), accelerator.device)
            else:
                shards = partition(session.method)
            session.prepare()
        if start is None:
            check_conventions(session)
        measured = processes.first and can_report(session)
        step, interrupted = Trainer(session, accelerator, folder, shards).run(start)
        if not interrupted and processes.first:
            heartbeat(folder, step, "exporting")
            export(folder, folder / "export")
            if measured:
                heartbeat(folder, step, "measuring")
                report = write_report(folder, recipe)
            heartbeat(folder, step, "done")
    except KeyboardInterrupt:  # outside the loop, which takes signals itself: nothing half done is kept
        interrupted = True
    if interrupted:
        say(f"stopped after step {step}; go on with: stepdistill train {folder / 'recipe.yaml'}")
    return RunResult(folder, step, interrupted, report)


class Trainer:
    """Players with an optimizer each, taking turns.

    Args:
        session: the method with its roles and data. folder: the run folder, with recipe.yaml in it.
        shards: the networks that are shared out among the processes.
    """

    def __init__(self, session: Session, accelerator: Accelerator, folder: Path, shards: Shards | None = None):
        self.session, self.accelerator, self.folder = session, accelerator, folder
        self.processes = Processes(accelerator)
        self.recipe, self.method = session.recipe, session.method
        self.shards = shards or Shards()
        self.shards.settle()
        self.parameters = {player: self._parameters(player) for player in self.method.players}
        self.zero = self.recipe.distributed.zero if self.processes.count > 1 else None
        self.optimizers = {}
        for player, parameters in self.parameters.items():
            settings = self.recipe.train, self._peak_rate(player)
            with only_moving(parameters):
                self.optimizers[player] = (
                    ZeroOptimizer(self.method.modules(player), *settings, self.zero)
                    if self.zero
                    else make_optimizer(parameters, *settings)
                )
        self.average = MovingAverage(self.method.roles.student.network, self.recipe.student.ema)
        self.finite = FiniteWatch()
        self.stop_requested = False
        self.spent = 0
        # What building the session cost, the same in every process.
        self.built = self._evaluations()

    def _parameters(self, player: str) -> list[nn.Parameter]:
        return [p for module in self.method.modules(player) for p in module.parameters()]

    def _peak_rate(self, player: str) -> float:
        return self.recipe.train.lr if player == "student" else self.recipe.train.critic_lr

    def state(self, step: int) -> checkpoint.State:
        """Everything that a checkpoint holds."""
        roles = self.method.roles
        networks = {name: getattr(roles, name).network for name in ("student", *self.method.extra_roles)}
        averages = {"student": self.average.weights} if self.average.weights else {}
        return checkpoint.State(step, networks | self.method.extra_modules(), self.optimizers, averages)

    def run(self, start: Path | None) -> tuple[int, bool]:
        """Train from checkpoint ``start`` (None: from the teacher) to the end; returns (steps done, interrupted)."""
        train, checkpoints = self.recipe.train, self.folder / "checkpoints"
        first = checkpoint.load(start, self.state(0)) if start else 0
        if start:
            say(f"resumed from {start}")
        # What building the session cost has been counted by the interrupted run's lines as well.
        lines = self.folder / "metrics.jsonl"
        self.spent = max(0, self.processes.once(lambda: keep_lines_before(lines, first)) - self.built)
        if first >= train.steps:
            return first, False
        every = self.recipe.evaluation.every
        best = (self.folder / BEST, self.recipe.evaluation.keep_best) if every else ()
        self.processes.once(
            lambda: checkpoint.check_space(checkpoints, self.state(first), train.keep_checkpoints, *best)
        )
        # Networks that are shared out run in all processes or in none; only one of them writes.
        looks = self.processes.first or bool(self.shards)
        with self.processes.counted_once(self._roles()):
            evaluation = Evaluation(self.session, self.folder, first) if every and looks else None
        if self._enough(evaluation):
            return first, False
        with self.processes.counted_once(self._roles()):
            preview = Preview(self.session, self.folder, self.processes.first) if looks else None
        self.accelerator.init_trackers("tensorboard")
        step, saved, enough = first, first, False
        watchdog = Watchdog(self.folder, train.watchdog_minutes, first, self.processes.rank)
        exactness = float32.passes(train, self.method.guides_both, self.accelerator.device)
        with self._signals(), TrainingProgress(first, train.steps) as progress, watchdog, exactness:
            if first == 0 and preview:
                with self.processes.counted_once(self._roles()):
                    preview.write(0, self.averaged())
            while step < train.steps and not enough and not self._stopping(step):
                metrics = self.step(step, log=(step + 1) % train.log_every == 0 or step in (first, train.steps - 1))
                step += 1
                watchdog.step(step)
                kept = step % train.checkpoint_every == 0 or step == train.steps
                shown = step % train.preview_every == 0 or step == train.steps
                measured = every and (step % every == 0 or step == train.steps)
                if kept or shown or measured:
                    self.finite.check()
                if shown and preview:
                    with self.processes.counted_once(self._roles()):
                        metrics |= preview.write(step, self.averaged())
                if measured:
                    metrics |= self._measure(evaluation, step)
                    enough = self._enough(evaluation)
                if metrics or kept or shown or measured:  # a run that goes on from here counts on from here
                    metrics["evaluations"] = self.evaluations()
                progress.update(step, metrics)
                if metrics and self.processes.first:
                    self._log(step, metrics)
                if kept:
                    self._save(checkpoints, step)
                    saved = step
            if saved < step:
                self.finite.check()
                if not metrics:
                    spent = {"evaluations": self.evaluations()}
                    if self.processes.first:
                        self._log(step, spent)
                self._save(checkpoints, step)
        for tracker in self.accelerator.trackers:  # end_training() would end the process group too: export is to come
            tracker.finish()
        return step, self.stop_requested and step < train.steps

    def _enough(self, evaluation: Evaluation | None) -> bool:
        """Whether the student has stopped getting better; the first process, which evaluates, answers for all."""

        def answer() -> bool:
            if evaluation is None or not evaluation.exhausted:
                return False
            step = ranked(evaluation.values)[0]
            say(
                f"no better {evaluation.settings.metric} since step {step} ({evaluation.values[step]:.4g}): that is all"
            )
            return True

        return self.processes.once(answer)

    def _stopping(self, step: int) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step.

        Several processes ask each other where they read their metrics anyway: an answer costs a wait for the device.
        """
        if self.processes.count == 1 or step % self.recipe.train.log_every == 0:
            self.stop_requested = self.processes.any(self.stop_requested)
            return self.stop_requested
        return False

    def _measure(self, evaluation: Evaluation | None, step: int) -> dict[str, float]:
        """Measure the student, and keep its checkpoint if it is among the best; the first process decides."""
        value = None
        if evaluation:
            with self.processes.counted_once(self._roles()):
                value = evaluation.measure(self.averaged())
        value = self.processes.once(lambda: value)
        if evaluation:
            evaluation.values[step] = value
        if self.processes.once(lambda: step in evaluation.best):
            self._write(self.folder / BEST, step, self.recipe.evaluation.keep_best + 1)
        self.processes.once(lambda: evaluation.write())
        return {f"evaluation/{self.recipe.evaluation.metric}": value}

    def _save(self, checkpoints: Path, step: int) -> None:
        parameters = itertools.chain.from_iterable(self.parameters.values())
        self.processes.check_equal(step, (p for p in parameters if not is_shard(p)))
        self._write(checkpoints, step, self.recipe.train.keep_checkpoints)

    def _write(self, folder: Path, step: int, keep: int) -> None:
        """Write a checkpoint."""
        if self.shards or self.zero:
            self.shards.settle()
            checkpoint.save(folder, self.state(step), keep, self.processes.once, self.processes.first)
        else:
            self.processes.once(lambda: checkpoint.save(folder, self.state(step), keep))

    def step(self, step: int, log: bool = False) -> dict[str, float]:
        """All turns of one step. With ``log``: every loss term, and the gradient norm of each player and term."""
        train = self.recipe.train
        starts, size = self.processes.share(train.batch_size, train.accumulation)
        batches = [self.session.batch(step, start, size) for start in starts]
        metrics: dict[str, float] = {}
        began = time.perf_counter()
        if train.compile == "cuda-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        for turn, player in enumerate(self.method.turns(step)):
            for batch in batches:
                batch.turn, batch.signals = turn, {}
            measured = self._turn(player, step, batches, log)
            for name, value in measured.items():
                metrics[f"{player}/{name}"] = value
        self.finite.end_step()
        if not log:
            return {}
        metrics = self.processes.mean(metrics)
        return metrics | {"lr": learning_rate(train, step, train.lr), "seconds": time.perf_counter() - began}

    def evaluations(self) -> int:
        """Rows that went through any network so far, in all processes and all parts of an interrupted run."""
        return self.spent + self.built + self.processes.sum(self._evaluations() - self.built)

    def _evaluations(self) -> int:
        return sum(role.evaluations for role in self._roles())

    def _roles(self) -> list[Denoiser]:
        return [getattr(self.method.roles, name) for name in ("teacher", "student", *self.method.extra_roles)]

    def _turn(self, player: str, step: int, batches: list[Batch], log: bool) -> dict[str, float]:
        train, parameters, optimizer = self.recipe.train, self.parameters[player], self.optimizers[player]
        metrics: dict[str, float] = {}
        self.shards.settle()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, self._peak_rate(player))
        backward = optimizer.backward if self.zero else Tensor.backward
        with only_moving(parameters):
            for number, batch in enumerate(batches):
                with forward_passes(train, self.accelerator.device.type):
                    losses = self.method.losses(player, batch)
                for term, loss in losses.items():
                    self.finite.add(f"{player} loss term {term!r}", step, loss)
                    if log:
                        previous = metrics.get(f"loss/{term}", 0.0)
                        metrics[f"loss/{term}"] = previous + loss.item() / len(batches)
                if log:
                    for name, value in batch.signals.items():
                        previous = metrics.get(f"signal/{name}", 0.0)
                        metrics[f"signal/{name}"] = previous + value.item() / len(batches)
                # Where weights are shared out, autograd has no gradients to show before the backward pass is done.
                if log and number == 0 and len(losses) > 1 and not self.shards:
                    for term, loss in losses.items():
                        metrics[f"grad_norm/{term}"] = _norm(loss, parameters)
                backward(sum(losses.values()) / len(batches))
            norm = optimizer.norm() if self.zero else self._update(parameters, optimizer)
            self.finite.add(f"{player} gradient ({' + '.join(losses)})", step, norm)
        for statistic in self.method.statistics():
            self.processes.add_up(statistic)
        self.method.after_update(player)
        if player == "student":
            self.average.update(step)
        if log:
            metrics["grad_norm"] = norm.item()
        return metrics

    def _update(self, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
        """Average the gradients, clip them and follow them; returns the norm () that they had."""
        self.processes.average_gradients(p for p in parameters if not is_shard(p))
        self.shards.settle()
        norm = clip_gradients(parameters, self.recipe.train.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the student carries its moving average, the weights that will be exported."""
        self.shards.settle()
        with self.average.applied():
            yield
            self.shards.settle()

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            rounded = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in metrics.items()}
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        self.accelerator.log(metrics, step=step)
        heartbeat(self.folder, step, "training")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM finish the step, save, and say how to go on."""

        def request(*_: Any) -> None:
            self.stop_requested = True

        try:
            previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread (a notebook's worker): signals stay as they are
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
