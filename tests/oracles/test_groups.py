"""One affine student cannot be a mixture of two classes; two of them, one a class, are exactly that."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stepdistill.data.chosen import ChosenRows
from stepdistill.diffusion.routing import Router
from stepdistill.errors import InputError
from stepdistill.methods import METHODS, Roles
from stepdistill.pipeline.conditioning import Conditioning
from stepdistill.pipeline.groups import own_group
from stepdistill.testing.analytic import LABELS, MixtureDenoiser, affine_critic
from stepdistill.testing.bed import KINDS, M1, SCHEDULES, OnGrid, at, batch, generator, gradients
from stepdistill.training.run_folder import check_groups

ALL = [(name, kind) for name in SCHEDULES for kind in KINDS]
ROUTER = Router(LABELS, classes=((0,), (1,)))


def slopes(schedule, kind, a, b, label, time):
    """Diff-Instruct's gradient in (a, b) of x = a z + b at one time, by quadrature over z and eps."""
    implementation = METHODS["diff-instruct"]
    student, critic = generator(schedule, kind, a, b), affine_critic(a, b, schedule, kind)
    roles = Roles(teacher=MixtureDenoiser(*M1, schedule, kind), student=student, critic=critic)
    config = implementation.Config(t_min=time, t_max=time)
    method = implementation(config, roles, OnGrid(schedule, [0.9]))
    nodes = torch.linspace(-8, 8, 161, dtype=torch.float64)
    weights = 0.1 * (-(nodes**2) / 2).exp()  # of the trapezoidal rule, which is spectrally exact here
    z, eps = (grid.flatten()[:, None] for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    rows = batch(len(z), labels=(label, 2))
    rows.noise = lambda name: z if name == "start" else eps
    measure = (weights[:, None] * weights).flatten() / (2 * math.pi)
    gradient = method.gradient
    # The loss is a mean over rows; with rows weighted it is the mean over z and eps.
    method.gradient = lambda x, rows: gradient(x, rows) * measure[:, None] * len(z)
    return gradients(method.losses("student", rows)["dm"], student)


def kl(schedule, a, b, label, time):
    """Of the noised student from the noised teacher, by a sum over a fine grid."""
    x = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    t, rows = at(time, len(x)), {LABELS: torch.full((len(x),), label)}
    fake = affine_critic(a, b, schedule, "v").log_density(x, t)
    real = MixtureDenoiser(*M1, schedule, "v").log_density(x, t, rows)
    return (fake.exp() * (fake - real)).sum().item() * 18 / 20000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("time", "a", "b", "floor"),
    [
        (0.3, 1.159462, 0.079278, 0.260247),
        (0.5, 1.250903, -0.005411, 0.021999),
        (0.7, 1.295151, -0.000694, 0.000247),
    ],
)
def test_golden_floor_of_one_student(kind, time, a, b, floor):
    """Label 2 is the whole mixture: the best affine student is stationary, and this divergence is left."""
    schedule = SCHEDULES["flow"]
    assert kl(schedule, a, b, 2, time) == pytest.approx(floor, abs=1e-6)
    assert math.hypot(*slopes(schedule, kind, a, b, 2, time)) < 2e-5
    assert math.hypot(*slopes(schedule, kind, a - 0.1, b + 0.1, 2, time)) > 1e-4


@pytest.mark.parametrize("name,kind", ALL)
@pytest.mark.parametrize("label", [0, 1])
def test_a_student_of_one_class_has_no_floor(name, kind, label):
    schedule, (mean, std) = SCHEDULES[name], (M1[1][label], M1[2][label])
    assert ROUTER.group(torch.tensor([label])).tolist() == [label]
    assert kl(schedule, std, mean, label, 0.5) == pytest.approx(0, abs=1e-9)
    assert math.hypot(*slopes(schedule, kind, std, mean, label, 0.5)) < 1e-7
    a, b = slopes(schedule, kind, std + 0.2, mean - 0.3, label, 0.5)
    assert a > 1e-5 and b < -1e-5


def test_prompts_go_to_the_nearest_centre_whatever_their_padding():
    router = Router("text", centres=((1.0, 0.0), (0.0, 1.0)))
    tokens = torch.tensor([[[3.0, 1.0], [2.0, 0.5]], [[0.1, 4.0], [0.2, 1.0]], [[9.0, 8.0], [0.0, 0.0]]])
    padded = torch.cat([tokens, torch.zeros(3, 5, 2)], 1)
    assert router.group(tokens).tolist() == router.group(padded).tolist() == [0, 1, 0]
    assert router.group(tokens.sum(1)).tolist() == [0, 1, 0]
    parts = dict(router.parts({"text": tokens}))
    assert {name: rows.tolist() for name, rows in parts.items()} == {"0": [0, 2], "1": [1]}
    assert router.parts({"text": tokens[1:2]}) == [("1", None)]


def test_the_empty_class_has_no_student(tmp_path):
    with pytest.raises(InputError, match="and no guidance, found class 2"):
        ROUTER.group(torch.tensor([0, 2]))
    ROUTER.write(tmp_path)
    assert Router.read(tmp_path) == ROUTER
    (tmp_path / "router.json").write_text('{"classes": [[0]]}')
    with pytest.raises(InputError, match="expected argument, classes and centres"):
        Router.read(tmp_path)


def test_groups_of_prompts_are_clusters_found_once_for_a_store(tmp_path):
    """Five places in three clusters, one of a single prompt; a run is held to its groups up to the last digits."""
    text = torch.tensor([[9.0, 1.0], [0.1, 5.0], [8.0, 1.0], [0.2, 3.0], [-1.0, -1.0]])[:, None]
    store = SimpleNamespace(folder=tmp_path / "store")
    names = ("a", "b", "c", "d", "e")
    rows = ChosenRows(text, torch.arange(5))  # as of a store: no tensor
    whole = Conditioning(names, {"text": rows}, {"text": text[:1]}, names, store=store)
    trace = SimpleNamespace(denoiser=SimpleNamespace(takes_turns=False))
    own = [own_group(SimpleNamespace(groups=3, group=number), trace, whole) for number in range(3)]
    assert sorted(sorted(one.entries) for one in own) == [["a", "c"], ["b", "d"], ["e"]]
    (alone,) = (one for one in own if len(one) == 1)
    assert torch.equal(alone.batch(torch.zeros(2, dtype=torch.long))[0]["text"], text[[4, 4]])
    assert len({one.key for one in own}) == 3
    router = own[0].group.router
    near = replace(router, centres=tuple(tuple(x + 1e-6 for x in one) for one in router.centres))
    far = replace(router, centres=tuple(tuple(x + 1e-2 for x in one) for one in router.centres))
    assert router.alike(near) and not router.alike(far) and not router.alike(ROUTER)
    check_groups(tmp_path, router, resumes=False)
    check_groups(tmp_path, near, resumes=True)
    with pytest.raises(InputError, match="expected the groups that the run in"):
        check_groups(tmp_path, far, resumes=True)
    text += 100  # not read again
    assert [*own_group(SimpleNamespace(groups=3, group=0), trace, whole).entries] == [*own[0].entries]
