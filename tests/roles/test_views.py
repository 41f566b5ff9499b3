"""Networks that are told the guidance scale: stock before training, stock again at the export."""

import copy

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from pipeline import zoo
from pipeline.tiny import tiny_dit, tiny_sd
from stepdistill.diffusion.denoiser import CallSpec, Denoiser
from stepdistill.diffusion.schedule import from_scheduler
from stepdistill.errors import InputError
from stepdistill.roles.added import GuidanceEmbedded, SlowTime, TimeEmbedded, fourier
from stepdistill.roles.build import LoRA, build_roles
from stepdistill.roles.views import AdapterView, plain_network

SCALE = 2.5


def dit() -> tuple[nn.Module, dict[str, Tensor]]:
    return tiny_dit().transformer, {"class_labels": torch.tensor([3, 7])}


def unet() -> tuple[nn.Module, dict[str, Tensor]]:
    return tiny_sd().unet, {"encoder_hidden_states": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}


def pixart() -> tuple[nn.Module, dict[str, Tensor]]:
    """Of 1024 px: two more modules of the time embedding's class, one with two rows per sample."""
    text = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    sizes = {"resolution": torch.tensor([[16.0, 16.0], [24.0, 8.0]]), "aspect_ratio": torch.tensor([[1.0], [3.0]])}
    return zoo.pixart(sigma=False).transformer, {"encoder_hidden_states": text, "added_cond_kwargs": sizes}


NETWORKS = {"dit": dit, "unet": unet, "pixart": pixart}


def call(network: nn.Module, cond: dict[str, Tensor], **told: Tensor) -> Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return network(x, timestep=torch.tensor([400, 20]), **cond, **told, return_dict=False)[0]


def trained(network: nn.Module, seed: int = 2) -> nn.Module:
    """The network after some training: whatever it moves is not where it started."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return network


@pytest.fixture(params=NETWORKS)
def bare(request) -> tuple[nn.Module, dict[str, Tensor]]:
    return NETWORKS[request.param]()


def test_it_starts_as_the_bare_network(bare):
    network, cond = bare
    expected = call(network, cond)
    embedded = GuidanceEmbedded(network, SCALE)
    assert torch.equal(call(embedded, cond), expected)
    assert torch.equal(call(embedded, cond, guidance_scale=torch.tensor([1.0, 7.0])), expected)


def test_after_training_each_row_has_its_own_scale(bare):
    network, cond = bare
    embedded = trained(GuidanceEmbedded(network, SCALE))
    one, other = (call(embedded, cond, guidance_scale=torch.full((2,), w)) for w in (1.0, 4.0))
    assert (one - other).abs().amax((1, 2, 3)).min() > 1e-3
    mixed = call(embedded, cond, guidance_scale=torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(mixed, torch.stack([one[0], other[1]]))
    torch.testing.assert_close(call(embedded, cond), call(embedded, cond, guidance_scale=torch.full((2,), SCALE)))


def test_a_row_alone_is_the_row_of_a_batch(bare):
    """Also where the network embeds several numbers of each row, by modules of the time embedding's class."""
    network, cond = bare
    embedded = trained(GuidanceEmbedded(network, SCALE))

    def of(rows: slice) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))[rows]
        conditions = tree_map(lambda value: value[rows], cond)
        scale, times = torch.tensor([1.0, 4.0])[rows], torch.tensor([400, 20])[rows]
        return embedded(x, timestep=times, **conditions, guidance_scale=scale, return_dict=False)[0]

    torch.testing.assert_close(torch.cat([of(slice(0, 1)), of(slice(1, 2))]), of(slice(0, 2)))


def test_the_scale_joins_the_time_alone():
    """Not what else is embedded by modules of the same class: sizes and aspects, guidance."""
    counts = {"pixart-alpha": 1, "sdxl": 1, "flux": 1, "sana": 1, "dit": 3, "ddpm": 1, "wan": 1}
    for name, count in counts.items():
        pipeline = zoo.ZOO[name].build()
        network = getattr(pipeline, "transformer", None) or pipeline.unet
        assert len(GuidanceEmbedded(network, SCALE).leaves) == count, name


def test_at_one_scale_a_stock_network_does_the_same(bare):
    network, cond = bare
    embedded = trained(GuidanceEmbedded(network, SCALE))
    stock = plain_network(embedded)
    assert type(stock) is type(network) and stock.state_dict().keys() == network.state_dict().keys()
    expected = call(embedded, cond)
    assert (call(stock, cond) - expected).abs().max() <= 1e-6 * expected.abs().max()
    elsewhere = call(embedded, cond, guidance_scale=torch.full((2,), SCALE + 0.5))
    assert (call(stock, cond) - elsewhere).abs().max() > 1e-3


def test_the_stock_network_is_a_copy(bare):
    network, cond = bare
    embedded = trained(GuidanceEmbedded(network, SCALE))
    before, expected = copy.deepcopy(network.state_dict()), call(embedded, cond)
    trained(embedded.plain(), seed=3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(call(embedded, cond), expected)


def test_the_scale_is_forgotten_after_a_call(bare):
    network, cond = bare
    embedded = trained(GuidanceEmbedded(network, SCALE))
    expected = call(network, cond)
    call(embedded, cond, guidance_scale=torch.tensor([1.0, 7.0]))
    assert torch.equal(call(network, cond), expected)


def test_its_parameters_are_the_networks_and_its_own():
    network, cond = dit()
    embedded = GuidanceEmbedded(network, SCALE)
    names = dict(embedded.named_parameters())
    own = {name for name in names if not name.startswith("network.")}
    assert {name.partition(".")[0] for name in own} == {"trunk", "leaves"}
    assert len(names) - len(own) == len(list(network.parameters()))
    call(embedded, cond, guidance_scale=torch.tensor([1.0, 7.0])).square().sum().backward()
    assert all(leaf.weight.grad.abs().max() > 0 for leaf in embedded.leaves)


def test_a_lora_student_is_told_and_exported_too():
    pipeline = tiny_dit()
    schedule, kind = from_scheduler(pipeline.scheduler)
    spec = CallSpec("hidden_states", "timestep", timestep_dtype=torch.int64)
    network, cond = pipeline.transformer, {"class_labels": torch.tensor([3, 7])}
    expected = call(network, cond)
    roles = build_roles(Denoiser(network, spec, schedule, kind), {"student": "lora", "target": "lora"}, SCALE, LoRA(4))
    student, target = (GuidanceEmbedded(role.network, SCALE) for role in (roles.student, roles.target))
    for slow, fast in zip(target.parameters(), student.parameters(), strict=True):
        slow.data.copy_(fast.data)
    assert torch.equal(call(student, cond), expected)
    names = dict(student.named_parameters())
    assert all(".student." in name for name in names if name.startswith("network."))
    trained(student)
    told = {"guidance_scale": torch.tensor([1.0, 4.0])}
    moved = call(student, cond, **told)
    assert (moved - expected).abs().max() > 1e-2
    assert torch.equal(call(target, cond, **told), expected) and torch.equal(
        call(roles.teacher.network, cond), expected
    )
    stock = plain_network(student)
    assert not isinstance(stock, AdapterView) and type(stock) is type(tiny_dit().transformer)
    torch.testing.assert_close(call(stock, cond), call(student, cond), rtol=1e-5, atol=1e-5)


def test_the_scale_joins_before_an_activation_that_follows():
    """Where an activation comes after the embedding's last layer, only what joins before it folds into a bias."""

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = TimestepEmbedding(8, 8, post_act_fn="silu")

        def forward(self, x: Tensor) -> Tensor:
            return self.embedding(x)

    embedded, x = trained(GuidanceEmbedded(Embedder(), SCALE)), torch.randn(3, 8)
    torch.testing.assert_close(embedded.plain()(x), embedded(x), rtol=1e-6, atol=1e-6)


def test_the_end_of_a_step_is_an_input_of_the_same_kind(bare):
    network, cond = bare
    expected, ends = call(network, cond), torch.tensor([0.0, 0.7])
    embedded = TimeEmbedded(network)
    assert torch.equal(call(embedded, cond, second_time=ends), expected)
    trained(embedded)
    whole = call(embedded, cond)
    mixed = call(embedded, cond, second_time=ends)
    torch.testing.assert_close(mixed[0], whole[0])
    assert (mixed[1] - whole[1]).abs().max() > 1e-3
    torch.testing.assert_close(call(embedded.plain(), cond), whole, rtol=1e-5, atol=1e-6)


def test_what_adds_to_the_network_around_it_takes_it_along(bare):
    network, cond = bare
    ends, spec = torch.tensor([0.2, 0.7]), CallSpec("hidden_states", "timestep")
    stacked = trained(SlowTime(GuidanceEmbedded(TimeEmbedded(network), SCALE), 50))
    assert Denoiser(stacked, spec, None, "eps").takes_r and not Denoiser(network, spec, None, "eps").takes_r
    assert (call(stacked, cond, second_time=ends) - call(stacked, cond)).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(call(stacked.plain(), cond), call(stacked, cond), rtol=1e-4, atol=1e-5)


def test_fourier_features_tell_scales_apart():
    features = fourier(torch.tensor([1.0, 1.5, 7.0]) - 1, 256)
    assert features.shape == (3, 256)
    assert torch.equal(features[0], torch.cat([torch.zeros(128), torch.ones(128)]))
    # The slowest and the fastest rate: 1000 (w - 1) / 10000 and 1000 (w - 1).
    torch.testing.assert_close(features[:, 127], torch.tensor([0.0, 0.05, 0.6]).sin())
    torch.testing.assert_close(features[1:, 0], torch.tensor([500.0, 6000.0]).sin())


def test_a_network_without_time_is_refused():
    with pytest.raises(InputError, match="Linear has no timestep embedding"):
        GuidanceEmbedded(nn.Linear(2, 2), SCALE)


@pytest.mark.parametrize("lora", [False, True])
def test_a_slow_time_folds_into_the_stock_network(bare, lora):
    network, cond = bare
    stocks = type(network)
    if lora:
        schedule, kind = from_scheduler(tiny_dit().scheduler)
        spec = CallSpec("sample", "timestep")
        network = build_roles(
            Denoiser(network, spec, schedule, kind), {"student": "lora"}, 1.0, LoRA(4)
        ).student.network
    before = call(network, cond)
    slow = trained(SlowTime(network, 50))
    assert len(list(slow.parameters())) == len(list(network.parameters()))
    stock = slow.plain()
    assert type(stock) is stocks
    torch.testing.assert_close(call(stock, cond), call(slow, cond), rtol=1e-5, atol=1e-5)
    assert (call(slow, cond) - before).abs().max() > 1e-3


def test_a_slow_time_damps_short_periods_only(bare):
    network, _ = bare
    sinusoids, period = next(m for m in network.modules() if isinstance(m, Timesteps)), 50
    factors = SlowTime(network, period).factors(sinusoids)
    t = torch.linspace(0, 4000, 80001)
    features = sinusoids(t)
    crossings = (features[1:] * features[:-1] < 0).sum(0)
    for feature, (factor, count) in enumerate(zip(factors.tolist(), crossings.tolist(), strict=True)):
        if count >= 8:
            own = 2 * 4000 / count
            assert factor == pytest.approx(1 / (1 + (period / own) ** 4), abs=0.15), feature
    assert factors.min() < 1e-3 and factors.max() > 0.999


def test_a_slow_time_makes_the_derivative_in_time_a_secant(bare):
    network, cond = bare
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def roughness(network: nn.Module) -> float:
        def run(timestep: Tensor) -> Tensor:
            return network(x, timestep=timestep, **cond, return_dict=False)[0]

        t = torch.tensor([400.0, 120.0])
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            slope = torch.func.jvp(run, (t,), (torch.ones_like(t),))[1]
            secant = (run(t + 4) - run(t - 4)) / 8
        return ((slope - secant).norm() / secant.norm()).item()

    assert roughness(SlowTime(network, 100)) < 0.1 < 0.5 < roughness(network)


def test_a_slow_time_leaves_other_embeddings_alone():
    """SDXL embeds image sizes with the same classes, Flux its guidance; neither is a time."""
    parent = nn.Module()
    parent.time_proj, parent.time_embedding = Timesteps(8, True, 0), TimestepEmbedding(8, 4)
    parent.add_time_proj, parent.add_embedding = Timesteps(8, True, 0), TimestepEmbedding(8, 4)
    stock = SlowTime(parent, 50).plain()
    assert not torch.equal(stock.time_embedding.linear_1.weight, parent.time_embedding.linear_1.weight)
    assert torch.equal(stock.add_embedding.linear_1.weight, parent.add_embedding.linear_1.weight)
    assert isinstance(SlowTime(nn.Linear(2, 2), 50).plain(), nn.Linear)
