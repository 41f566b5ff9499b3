"""The training loop, on accelerate. It knows players, turns and losses by name, and no method's mathematics.

Several processes share each update's batch: every one computes its rows, gradients are averaged, and all take the same
optimizer step. The draws of a batch depend on a row's global index alone, so a run does not depend on their number.
"""

import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from stepdistill.data.batch import Batch
from stepdistill.diffusion import float32
from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.progress import TrainingProgress, say
from stepdistill.roles.parts import is_shard
from stepdistill.training import checkpoint
from stepdistill.training.between_steps import Drawing, Measuring, Saving
from stepdistill.training.distributed import Processes
from stepdistill.training.finite import FiniteWatch
from stepdistill.training.layout import RunFolder
from stepdistill.training.moving_average import MovingAverage, ScheduleFreeAverage
from stepdistill.training.optimizer import learning_rate, make_optimizer, only_moving, peak_rate
from stepdistill.training.recompute import forward_passes
from stepdistill.training.run_folder import keep_lines_before
from stepdistill.training.runs import heartbeat
from stepdistill.training.session import Session
from stepdistill.training.shard import Shards, clip_gradients
from stepdistill.training.tracking import Tracking
from stepdistill.training.watchdog import Watchdog


class Trainer:
    """Players with an optimizer each, taking turns.

    Args:
        session: the method with its roles and data.
        folder: the run folder, with recipe.yaml in it.
        shards: the networks whose weights are sharded.
    """

    def __init__(self, session: Session, accelerator: Accelerator, folder: Path, shards: Shards | None = None):
        self.session, self.accelerator, self.folder = session, accelerator, RunFolder(folder)
        self.processes = Processes(accelerator)
        self.recipe, self.method = session.recipe, session.method
        self.shards = shards or Shards()
        self.shards.settle()
        self.parameters = {player: self._parameters(player) for player in self.method.players}
        self.optimizers = {}
        for player, parameters in self.parameters.items():
            with only_moving(parameters):
                self.optimizers[player] = make_optimizer(parameters, self.recipe.train, player)
        student = self.method.roles.student.network
        if self.recipe.train.optimizer_of("student").name == "schedulefree":
            self.average = ScheduleFreeAverage(student, self.optimizers["student"])
        else:
            self.average = MovingAverage(student, self.recipe.student.ema)
        self.finite = FiniteWatch()
        self.tracking: Tracking | None = None
        self.stop_requested = False
        self.measured: dict[str, float] = {}
        """What players did in their last turns before the next line of metrics."""
        self.spent = 0
        # What building the session cost, the same in every process.
        self.built = self._evaluations()

    def _parameters(self, player: str) -> list[nn.Parameter]:
        return [p for module in self.method.checked_modules(player) for p in module.parameters()]

    def state(self, step: int) -> checkpoint.State:
        """Everything that a checkpoint holds."""
        networks = {name: role.network for name, role in self.method.roles.items() if name != "teacher"}
        averages = {"student": weights} if (weights := self.average.weights) else {}
        return checkpoint.State(step, networks | self.method.extra_modules(), self.optimizers, averages)

    def run(self, start: Path | None) -> tuple[int, bool]:
        """Train from checkpoint ``start`` (None: from the teacher) to the end; returns (steps done, interrupted)."""
        train, first = self.recipe.train, self._begin(start)
        if first >= train.steps:
            return first, False
        saving, measuring = Saving(self, first), Measuring(self, first)
        if measuring.enough:
            return first, False
        drawing = Drawing(self)
        if self.processes.first:
            self.tracking = Tracking(self.recipe, self.folder.path, first)
        watchdog = Watchdog(self.folder.path, train.watchdog_minutes, self.processes.rank)
        exactness = float32.passes(train.precision, self.method.guides_both, self.accelerator.device)
        step, metrics = first, {}
        tracked, ahead = self.tracking or nullcontext(), self.session.gathering_ahead()
        progress = TrainingProgress(first, train.steps)
        with self._signals(), tracked, progress, watchdog, exactness, ahead:
            if first == 0:
                drawing.do(0)
            while step < train.steps and not measuring.enough and not self._stopping(step):
                metrics = self.step(step, log=(step + 1) % train.log_every == 0 or step in (first, train.steps - 1))
                step += 1
                watchdog.step()
                due = [one for one in (drawing, measuring) if one.due(step)]
                if due or saving.due(step):
                    self.finite.check()
                for one in due:
                    metrics |= one.do(step)
                if metrics or due or saving.due(step):  # a run that goes on from here counts on from here
                    metrics["evaluations"] = self.evaluations()
                    self._log(step, metrics)
                progress.update(step, metrics)
                if saving.due(step):
                    saving.do(step)
            if saving.step < step:
                self.finite.check()
                if not metrics:
                    self._log(step, {"evaluations": self.evaluations()})
                saving.do(step)
        return step, self.stop_requested and step < train.steps

    def _begin(self, start: Path | None) -> int:
        """Load the checkpoint and count on from its line of metrics; returns the next step."""
        first = checkpoint.load(start, self.state(0)) if start else 0
        if start:
            say(f"resumed from {start}")
        # What building the session cost has been counted by the interrupted run's lines as well.
        lines = self.folder.metrics
        self.spent = max(0, self.processes.once(lambda: keep_lines_before(lines, first)) - self.built)
        return first

    @property
    def looks(self) -> bool:
        """Whether this process runs the student to look at it: where weights are sharded, all run it or none."""
        return self.processes.first or bool(self.shards)

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Inside, rows that go through the networks are no part of what training costs: previews and measurements."""
        roles = self._roles()
        before = [role.evaluations for role in roles]
        yield
        for role, evaluations in zip(roles, before, strict=True):
            role.evaluations = evaluations

    def _stopping(self, step: int) -> bool:
        """Whether any process was asked to stop, so that all stop after the same step.

        Several processes ask each other where they read their metrics anyway: an answer costs a wait for the device.
        """
        if self.processes.count == 1 or step % self.recipe.train.log_every == 0:
            self.stop_requested = self.processes.any(self.stop_requested)
            return self.stop_requested
        return False

    def write_checkpoint(self, folder: Path, step: int, keep: int) -> None:
        """Write a checkpoint into ``folder``, and delete all but the newest ``keep``; all processes together."""
        if self.shards:
            self.shards.settle()
            checkpoint.save(folder, self.state(step), keep, self.processes.once, self.processes.first)
        else:
            self.processes.once(lambda: checkpoint.save(folder, self.state(step), keep))

    def step(self, step: int, log: bool = False) -> dict[str, float]:
        """All turns of one step.

        With ``log``: every loss term, and the gradient norm of each player and term; of a player without a turn in this
        step those of its last one since the step that was logged before.
        """
        with self.session.at(self.session.size_of(step)):
            return self._step(step, log)

    def _step(self, step: int, log: bool) -> dict[str, float]:
        train = self.recipe.train
        starts, size = self.processes.share(train.batch_size, train.accumulation)
        batches = [self.session.batch(step, start, size) for start in starts]
        if step + 1 < train.steps:
            self.session.announce(step + 1, starts, size)
        began = time.perf_counter()
        if train.compile == "cuda-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        turns = self.method.checked_turns(step)
        last = set(turns) if log else self._last_turns(step, turns)
        for turn, player in enumerate(turns):
            for batch in batches:
                batch.turn, batch.signals = turn, {}
            with record_function(f"turn of {player}"):
                measured = self._turn(player, step, batches, player in last)
            self.measured |= {f"{player}/{name}": value for name, value in measured.items()}
        self.finite.end_step()
        if not log:
            return {}
        metrics, self.measured = self.processes.mean(self.measured), {}
        return metrics | {"lr": learning_rate(train, step, train.lr), "seconds": time.perf_counter() - began}

    def _last_turns(self, step: int, turns: Sequence[str]) -> set[str]:
        """The players of ``turns`` that have no other turn up to the next step that is logged."""
        train = self.recipe.train
        line = min(step + train.log_every - 1 - step % train.log_every, train.steps - 1)
        last = set(turns)
        for later in range(step + 1, line + 1):
            if not last:
                break
            last -= set(self.method.checked_turns(later))
        return last

    def evaluations(self) -> int:
        """Rows that training put through any network so far, in all processes and all parts of an interrupted run."""
        return self.spent + self.built + self.processes.sum(self._evaluations() - self.built)

    def _evaluations(self) -> int:
        return sum(role.evaluations for role in self._roles())

    def _roles(self) -> list[Denoiser]:
        return [role for _, role in self.method.roles.items()]

    def _turn(self, player: str, step: int, batches: list[Batch], log: bool) -> dict[str, float]:
        train, parameters, optimizer = self.recipe.train, self.parameters[player], self.optimizers[player]
        metrics: dict[str, float] = {}
        self.shards.settle()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, peak_rate(train, player))
        with only_moving(parameters):
            for number, batch in enumerate(batches):
                with forward_passes(train, self.accelerator.device.type):
                    losses = self.method.checked_losses(player, batch)
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
                (sum(losses.values()) / len(batches)).backward()
            norm = self._update(parameters, optimizer)
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
        uneven = any(role.takes_turns for role in self._roles())
        self.processes.average_gradients((p for p in parameters if not is_shard(p)), uneven)
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
        if not self.processes.first:
            return
        with open(self.folder.metrics, "a", encoding="utf-8") as file:
            rounded = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in metrics.items()}
            file.write(json.dumps({"step": step, **rounded}) + "\n")
        if self.tracking:
            self.tracking.log(metrics, step)
        heartbeat(self.folder.path, step, "training")

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
