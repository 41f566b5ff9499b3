"""A method in a user's file: what it imports, and mistakes in it that end at its own line."""

import pytest
import torch

from stepdistill.errors import InputError
from stepdistill.methods import DistillMethod, MethodConfig, Roles
from stepdistill.recipe.find_method import find_method
from stepdistill.testing.bed import SCHEDULES, OnGrid, batch, generator

HEAD = """from stepdistill.methods import Batch, DistillMethod


class Mine(DistillMethod):
    summary = "mine"
    players = ("student", "judge")
    extra_roles = ("judge",)

    def losses(self, player, batch):
        """


def mine(tmp_path, body: str) -> tuple[DistillMethod, str]:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + body)
    schedule = SCHEDULES["flow"]
    players = {name: generator(schedule, "flow", 0.5, 0.1) for name in ("teacher", "student")}
    return find_method(f"{file}:Mine")(MethodConfig(), Roles(**players), OnGrid(schedule, [1.0])), str(file)


MISTAKES = {
    "return self.generate(batch, 0).square().mean()": r"losses\('student'\): expected a dict .* 'torch.Tensor'>",
    "return {'rows': self.generate(batch, 0)}": r"TypeError: losses\('student'\): expected a dict .* found dict of",
    "return {}": r"expected a dict of named 0-d tensors",
    "return {'x': self.roles.second(1)}": r"AttributeError: no role 'second': this run has teacher, student",
    "return {'x': batch.latents.mean()}": r"batch.latents is not given: declare DataNeeds\(images=True\)",
    "return {'x': batch.empty['class_labels']}": "batch.empty: expected a teacher with an empty condition, found none",
    "return {'x': batch.path.points.mean()}": r"batch.path is not given: declare DataNeeds\(paths=PathNeeds",
    "return {'x': batch.noise('a') @ batch.noise('b')}": r"RuntimeError: ",
    "return {'x': self.student(batch.noise('a'), self.times(1.0, batch), batch, self.times(0, batch)).x0.mean()}": (
        "has no input for a second time r"
    ),
}


@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_ends_at_the_methods_own_line(body, tmp_path):
    method, file = mine(tmp_path, body)
    line = 9 if "dict" in MISTAKES[body] else 10  # of what is returned, and of what goes wrong inside
    with pytest.raises(InputError, match=rf"^{file}:{line}: .*{MISTAKES[body]}"):
        method.checked_losses("student", batch(2))


def test_a_player_without_a_network_and_one_that_is_none(tmp_path):
    method, file = mine(tmp_path, "return {}\n\n    def turns(self, step):\n        return ('student', 'jugde')\n")
    with pytest.raises(InputError, match=rf"^{file}:4: AttributeError: no role 'judge'"):
        method.checked_modules("judge")
    with pytest.raises(InputError, match=rf"^{file}:12: ValueError: .*'student', 'judge'.* found \['jugde'\]"):
        method.checked_turns(0)


def test_a_sampler_that_does_not_exist_is_refused_with_its_class(tmp_path):
    (tmp_path / "mine.py").write_text(HEAD.replace('summary = "mine"', 'sampler_name = "renoize"') + "return {}\n")
    with pytest.raises(InputError, match=r"mine\.py .*Mine\.sampler_name: expected .*renoise.* found 'renoize'"):
        find_method(f"{tmp_path / 'mine.py'}:Mine")


def test_memory_is_no_mistake_of_the_method(tmp_path):
    method, _ = mine(tmp_path, "raise MemoryError\n")
    with pytest.raises(MemoryError):
        method.checked_losses("student", batch(2))


def test_turns_may_be_an_iterator(tmp_path):
    body = "return {}\n\n    def turns(self, step):\n        yield from ('judge', 'student')\n"
    method, _ = mine(tmp_path, body)
    assert list(method.checked_turns(0)) == ["judge", "student"]


@pytest.mark.parametrize("name", ["prepare", "losses"])
def test_a_name_with_memory_in_it_is_a_mistake_and_prepare_has_its_line_too(tmp_path, name):
    arguments = "player, batch" if name == "losses" else "batch"
    method, file = mine(tmp_path, f"return {{}}\n\n    def {name}(self, {arguments}):\n        self.memory_bank\n")
    checked = getattr(method, f"checked_{name}")
    with pytest.raises(InputError, match=rf"{file}:\d+: AttributeError: .*memory_bank"):
        checked(*(("student", batch(2)) if name == "losses" else (batch(2),)))


def test_a_batch_with_other_fields_is_another():
    rows = batch(2)
    given = rows.but(latents=torch.ones(2, 1))
    assert given.latents.sum() == 2 and given.state is rows.state
    with pytest.raises(InputError, match=r"batch\.latents is not given"):
        rows.latents  # noqa: B018
