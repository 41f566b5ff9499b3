"""What a learning rate means: the formula beside real updates of Adam."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from stepdistill.planning.update_speed import rms_change, speed
from stepdistill.recipe import load

LR, SIZE = 5e-5, 640


def network(rank: int | None = None, alpha: float | None = None) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    if rank is None:
        return made
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=["0"]), made, "student")


def weight(made: nn.Module) -> torch.Tensor:
    layer = made[0]
    return layer.weight.detach().clone() if isinstance(layer, nn.Linear) else delta(layer)


def delta(layer: nn.Module) -> torch.Tensor:
    return (layer.scaling["student"] * layer.lora_B["student"].weight @ layer.lora_A["student"].weight).detach()


@pytest.mark.parametrize(("rank", "alpha"), [(None, None), (64, None), (64, 8), (16, 32)])
def test_one_update_of_adam_moves_weights_as_far_as_the_formula_says(rank, alpha):
    made = network(rank, alpha)
    moving = [p for name, p in made.named_parameters() if rank is None or "lora_" in name]
    optimizer = torch.optim.AdamW(moving, LR, weight_decay=0.0)
    before, changes = weight(made), []
    for _ in range(20):
        made(torch.randn(64, SIZE)).mul(torch.randn(64, SIZE)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        after = weight(made)
        changes.append(float((after - before).square().mean().sqrt()))
        before = after
    assert changes[0] == pytest.approx(rms_change(LR, SIZE, rank, alpha), rel=0.03)
    # Gradients of noise: Adam's average of them moves less than its rate, by the same factor for all.
    assert 0.2 < changes[-1] / changes[0] < 1.05


def test_the_runs_that_were_published():
    """DMD2 on SDXL (64, alpha 8, 5e-5; a critic that is trained whole at 5e-5), at its layers of 1280 x 1280."""
    student, critic = rms_change(5e-5, 1280, 64, 8), rms_change(5e-5, 1280)
    assert student == pytest.approx(8.07e-7, rel=0.02) and critic / student == pytest.approx(61, rel=0.03)
    assert rms_change(5e-5, 1280, 64) / student == pytest.approx(8)


def test_a_network_counts_the_layers_that_move():
    made = nn.Sequential(nn.Linear(300, 100), nn.Conv2d(30, 10, 3))
    assert speed(made, LR).change == pytest.approx(LR)
    adapted = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["1"]), made, "critic")
    found = speed(adapted, LR, "critic")
    assert found.change == pytest.approx(rms_change(LR, 270, 4, 8))
    size = float(made[1].get_base_layer().weight.square().mean().sqrt())
    assert found.relative == pytest.approx(found.change / size)
    assert speed(adapted.to("meta"), LR, "critic").relative is None
    with pytest.raises(ValueError, match="no layer that student moves"):
        speed(made, LR, "student")


def test_recipes_move_their_players_as_the_published_runs_do():
    """DMD2 on SDXL: student 8.2e-7, critic 5e-5. SwD on SD 3.5 medium: both alike. SwiftBrush: to_q and to_v alone."""

    def rates(name: str, width: int) -> tuple[float, float]:
        recipe = load(name)
        student, critic, train = recipe.student, recipe.critic, recipe.train
        rank, alpha = critic.rank or student.rank, critic.alpha or student.alpha
        rank = None if recipe.role_training["critic"] == "full" else rank
        mine = rms_change(train.lr, width, student.rank, student.alpha)
        return mine, rms_change(train.critic_lr, width, rank, alpha)

    student, critic = rates("sdxl_dmd2_lora", 1280)
    assert student == pytest.approx(rms_change(5e-5, 1280, 64, 8)) and critic == 5e-5
    smaller, adapter = rates("sdxl_dmd2_lora_24gb", 1280)
    assert smaller == student and adapter / student == pytest.approx(16)  # between SwD's 1 and DMD2's 61
    for name in ("sd35_medium_dmd2_lora", "flux_dev_dmd2_lora"):
        student, critic = rates(name, 1536)
        assert student == critic == pytest.approx(rms_change(5e-6, 1536, 64, 64))
    swiftbrush = load("sd15_swiftbrush")
    assert swiftbrush.role_training == {"student": "full", "critic": "lora"}
    assert swiftbrush.critic.model_dump() == {"rank": 64, "alpha": 108, "targets": ["to_q", "to_v"]}
    assert (swiftbrush.train.precision, swiftbrush.teacher.precision) == ("fp32", "fp32") and swiftbrush.student.ema


def test_no_recipe_starts_where_half_precision_is_too_noisy():
    """Those on the linear table that begin at the noise end are in float32."""
    for name in ("pixart_sigma", "dit_xl_256", "sd15_sid"):
        assert load(name).train.precision == load(name).teacher.precision == "fp32"


def test_recipes_start_where_the_published_one_step_runs_do():
    """SiD-LSG 625, PixArt's DMD 400, both at rate 1e-6; DiT has PixArt's table, and starts at 799 as TDM does there."""
    found = {name: load(name) for name in ("sd15_sid", "pixart_sigma", "dit_xl_256")}
    assert [recipe.student.start for recipe in found.values()] == [625, 400, 799]
    assert found["sd15_sid"].train.lr == found["pixart_sigma"].train.lr == 1e-6
