"""The run folder's layout, without torch: commands that only look at runs answer at once."""

from pathlib import Path

from stepdistill.errors import InputError


class RunFolder:
    """What lies where in the folder of a run (docs/contracts.md).

    Args:
        path: the folder; nothing has to be there yet.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.grid = self.path / "grid.json"
        self.router = self.path / "router.json"
        self.teacher = self.path / "teacher.json"
        self.metrics = self.path / "metrics.jsonl"
        self.heartbeat = self.path / "heartbeat.json"
        self.tracker_id = self.path / "tracker.json"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.best_values = self.best / "values.json"
        self.previews = self.path / "previews"
        self.profile = self.path / "profile"
        self.export = self.path / "export"
        self.report = self.path / "report"

    @property
    def has_run(self) -> bool:
        """Whether a run took steps there; what a start that failed leaves behind is no run."""
        return self.recipe.exists() and (self.metrics.exists() or any(self.checkpoints.glob("*")))

    def check(self) -> None:
        """Raises InputError where no run has been."""
        if not self.recipe.is_file():
            raise InputError(f"{self.path}: expected a run folder with a recipe.yaml, found none")

    def stacks(self, rank: int) -> Path:
        """Where the process of this rank writes the stacks of its threads when it hangs."""
        return self.path / f"stacks-{rank}.txt"
