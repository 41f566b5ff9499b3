"""What a run does between its steps, each with ``due(step)`` and ``do(step)``: drawing, measuring and saving."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from stepdistill.progress import phase, say
from stepdistill.roles.parts import is_shard
from stepdistill.training import checkpoint
from stepdistill.training.evaluation import Evaluation, ranked
from stepdistill.training.previews import Preview

if TYPE_CHECKING:
    from stepdistill.training.trainer import Trainer


class Drawing:
    """Previews, every ``train.preview_every`` steps and after the last, of every size; of buckets of the first alone.

    Args:
        trainer: whose first process draws; all of them, where weights are sharded.
    """

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.train = trainer, trainer.recipe.train
        with trainer.uncounted():
            phase("drawing the teacher's previews")
            writes = trainer.processes.first
            every = enumerate(trainer.session.sizes if trainer.looks else ())
            sizes = [size for size, one in every if size == 0 or one.bucket is None]
            self.previews = [Preview(trainer.session, trainer.folder.path, writes, size) for size in sizes]

    def due(self, step: int) -> bool:
        """Whether there is a preview after ``step`` steps."""
        return step % self.train.preview_every == 0 or step == self.train.steps

    def do(self, step: int) -> dict[str, float]:
        """Draw it; returns the drift of the student's latents, of those of the first size."""
        with self.trainer.uncounted():
            drifts = [preview.write(step, self.trainer.averaged()) for preview in self.previews]
        if self.trainer.tracking and self.previews and self.previews[0].pictured:
            self.trainer.tracking.draw(self.previews[0].path(step), step)
        return drifts[0] if drifts else {}


class Measuring:
    """The evaluation of the student, every ``evaluation.every`` steps and after the last; the best checkpoints stay.

    ``enough``: the student has stopped getting better.

    Args:
        trainer: whose first process measures; all of them, where weights are sharded.
        first: the step at which the run starts or goes on.
    """

    def __init__(self, trainer: "Trainer", first: int):
        self.trainer, self.settings = trainer, trainer.recipe.evaluation
        with trainer.uncounted():
            wanted = self.settings.every and trainer.looks
            if wanted:
                phase(f"measuring the teacher for {self.settings.metric}")
            self.evaluation = Evaluation(trainer.session, trainer.folder.path, first) if wanted else None
        self.enough = trainer.processes.once(self._enough)

    def due(self, step: int) -> bool:
        """Whether the student is measured after ``step`` steps."""
        every = self.settings.every
        return bool(every) and (step % every == 0 or step == self.trainer.recipe.train.steps)

    def do(self, step: int) -> dict[str, float]:
        """Measure it, and keep its checkpoint if it is among the best; returns the value. The first process decides."""
        once, value = self.trainer.processes.once, None
        if self.evaluation is not None:
            with self.trainer.uncounted():
                value = self.evaluation.measure(self.trainer.averaged())
        value = once(lambda: value)
        if self.evaluation is not None:
            self.evaluation.values[step] = value
        if once(lambda: step in self.evaluation.best):
            self.trainer.write_checkpoint(self.trainer.folder.best, step, self.settings.keep_best + 1)
        once(lambda: self.evaluation.write())
        self.enough = once(self._enough)
        return {f"evaluation/{self.settings.metric}": value}

    def _enough(self) -> bool:
        if self.evaluation is None or not self.evaluation.exhausted:
            return False
        step = ranked(self.evaluation.values)[0]
        value = self.evaluation.values[step]
        say(f"early stop: {self.settings.metric} has not improved since step {step} (best {value:.4g})")
        return True


class Saving:
    """Checkpoints, every ``train.checkpoint_every`` steps and after the last; ``step`` is that of the newest.

    Args:
        trainer: whose state is saved.
        first: the step at which the run starts or goes on.

    Raises:
        InputError: the disk cannot hold them.
    """

    def __init__(self, trainer: "Trainer", first: int):
        self.trainer, self.train, self.step = trainer, trainer.recipe.train, first
        settings = trainer.recipe.evaluation
        best: tuple[Path, int] | tuple[()] = (trainer.folder.best, settings.keep_best) if settings.every else ()
        keep, folder = self.train.keep_checkpoints, trainer.folder.checkpoints
        trainer.processes.once(lambda: checkpoint.check_space(folder, trainer.state(first), keep, *best))

    def due(self, step: int) -> bool:
        """Whether there is a checkpoint after ``step`` steps."""
        return step % self.train.checkpoint_every == 0 or step == self.train.steps

    def do(self, step: int) -> None:
        """Write it."""
        parameters = itertools.chain.from_iterable(self.trainer.parameters.values())
        self.trainer.processes.check_equal(step, (p for p in parameters if not is_shard(p)))
        self.trainer.write_checkpoint(self.trainer.folder.checkpoints, step, self.train.keep_checkpoints)
        self.step = step
