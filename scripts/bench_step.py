"""How near a training step comes to the network passes it cannot do without.

    python scripts/bench_step.py --json step.json
    python scripts/bench_step.py --networks sd15 --methods dmd2 --precision bf16 --compile --json step.json
    python scripts/bench_step.py --fastgen path/to/FastGen --json step.json

For each method and network, on the same weights, batch and optimizer, in one process and in turns:

    floor        the bare forward and backward passes of the step, nothing else
    stepdistill  the trainer's own step
    elementwise  the same with train.gradient_checkpointing: elementwise (not with --compile)
    plain        the same method as a plain PyTorch loop: two calls for guidance, every loss and norm read
    fastgen      NVlabs/FastGen's step, from a checkout that the user names (its requirements must be installed)

Seconds are the device's where there is one, else the process' processor time, which other load leaves alone: medians,
and the ratio is the median of the ratios to the floor of the same round. activations_mib is the
most that the graphs of one student update keep at any moment, parameters apart; peak_mib the most that is alive in it,
forward and backward, of all that it makes. host_reads counts scalars read from tensors in one step.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_cases import SCALE, Case, copied, make_case, make_trainer, moving, step_of_one_rollout
from step_memory import kept_mib, peak_mib
from torch import Tensor, nn

from stepdistill.diffusion.denoiser import Denoiser
from stepdistill.diffusion.samplers import solver_grid
from stepdistill.eval.bench.sources import device_name, library_versions
from stepdistill.training.profiling import HostReads
from stepdistill.training.recompute import elementwise_recomputed
from stepdistill.training.trainer import Trainer


class Floor:
    """The passes of a step, with inputs of the right shapes and gradients of ones."""

    def __init__(self, trainer: Trainer, case: Case, precision: Callable[[], Any]):
        self.trainer, self.case, self.precision = trainer, case, precision
        both = {name: torch.cat([rows, case.empty[name]]) for name, rows in case.condition.items()}
        self.single = (case.latents, torch.full((case.size,), 0.5, device=case.device), case.condition)
        self.double = (torch.cat([case.latents] * 2), torch.full((2 * case.size,), 0.5, device=case.device), both)

    def forward(self, role: Denoiser, inputs: tuple) -> Tensor:
        return role.spec.decode_output(role.network(**role.arguments(*inputs)))

    def without_graph(self, *passes: tuple[Denoiser, tuple]) -> None:
        with torch.no_grad(), self.precision():
            for one in passes:
                self.forward(*one)

    def learn(self, player: str, role: Denoiser, *between: tuple[Denoiser, tuple]) -> None:
        with moving(self.trainer.parameters[player]):
            with self.precision():
                out = self.forward(role, self.single)
            self.without_graph(*between)
            out.backward(torch.ones_like(out))

    def dmd2(self) -> None:
        roles = self.case.method.roles
        self.without_graph((roles.student, self.single))
        self.learn("student", roles.student, (roles.teacher, self.double), (roles.critic, self.single))
        self.learn("critic", roles.critic)

    def lcm(self) -> None:
        roles = self.case.method.roles
        self.without_graph((roles.teacher, self.double), (roles.target, self.single))
        self.learn("student", roles.student)


class Plain:
    """A loop as one writes it by hand, on copies of the networks."""

    def __init__(self, case: Case, precision: Callable[[], Any]):
        roles = case.method.roles
        self.case, self.precision, self.schedule = case, precision, roles.teacher.schedule
        self.teacher = roles.teacher
        self.student, self.other = (roles.student.on(copied(roles.student.network)) for _ in range(2))
        self.optimizers = [
            torch.optim.AdamW(role.network.requires_grad_(True).parameters(), lr=1e-5, fused=True)
            for role in (self.student, self.other)
        ]
        self.times = [step.t for step in case.method.sampler.grid()]

    def at(self, time: float) -> Tensor:
        return torch.full((self.case.size,), time, device=self.case.device)

    def guided(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            cond = self.teacher(x, t, self.case.condition).raw
            uncond = self.teacher(x, t, self.case.empty).raw
        return uncond + SCALE * (cond - uncond)

    def update(self, loss: Tensor, role: Denoiser, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
        loss.backward()
        norm = nn.utils.clip_grad_norm_(role.network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    def noisy(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.rand(len(x), device=x.device)
        shaped, noise = t.reshape(-1, 1, 1, 1), torch.randn_like(x)
        return (1 - shaped) * x + shaped * noise, t, noise

    def dmd2_loss(self) -> tuple[Tensor, Tensor]:
        cond = self.case.condition
        x = torch.randn_like(self.case.latents)
        with torch.no_grad():
            x0 = x - self.times[0] * self.student(x, self.at(self.times[0]), cond).raw
            x = (1 - self.times[1]) * x0 + self.times[1] * torch.randn_like(x)
        x0 = x - self.times[1] * self.student(x, self.at(self.times[1]), cond).raw
        x_t, t, _ = self.noisy(x0.detach())
        shaped = t.reshape(-1, 1, 1, 1)
        real = x_t - shaped * self.guided(x_t, t)
        with torch.no_grad():
            fake = x_t - shaped * self.other(x_t, t, cond).raw
        gradient = (fake - real) / (x0.detach() - real).abs().mean((1, 2, 3), keepdim=True)
        return 0.5 * nn.functional.mse_loss(x0.float(), (x0 - gradient).detach().float()), x0.detach()

    def dmd2(self) -> None:
        with self.precision():
            loss, x0 = self.dmd2_loss()
        self.update(loss, self.student, self.optimizers[0])
        with self.precision():
            x_t, t, noise = self.noisy(x0)
            loss = nn.functional.mse_loss(self.other(x_t, t, self.case.condition).raw.float(), noise - x0)
        self.update(loss, self.other, self.optimizers[1])

    def lcm_loss(self) -> tuple[Tensor]:
        grid = solver_grid(self.schedule, 50).to(self.case.device, torch.float32)
        n = torch.randint(1, len(grid), (self.case.size,), device=self.case.device)
        t, r = grid[n], grid[n - 1]
        shaped, noise = t.reshape(-1, 1, 1, 1), torch.randn_like(self.case.latents)
        x_t = (1 - shaped) * self.case.latents + shaped * noise
        x_r = x_t + (r - t).reshape(-1, 1, 1, 1) * self.guided(x_t, t)
        with torch.no_grad():
            target = x_r - r.reshape(-1, 1, 1, 1) * self.other(x_r, r, self.case.condition).raw
        found = x_t - shaped * self.student(x_t, t, self.case.condition).raw
        return (((found.float() - target.float()).square() + 1e-6).sqrt().mean(),)

    def lcm(self) -> None:
        with self.precision():
            (loss,) = self.lcm_loss()
        self.update(loss, self.student, self.optimizers[0])
        with torch.no_grad():
            pairs = zip(self.other.network.parameters(), self.student.network.parameters(), strict=True)
            for slow, fast in pairs:
                slow.mul_(0.95).add_(fast, alpha=0.05)


class FastGen:
    """FastGen's own steps and its student's losses, on copies of the case's network; no GAN."""

    def __init__(self, checkout: Path, case: Case, precision: str):
        sys.path.insert(0, str(checkout))
        self.case, self.precision = case, precision
        self.data = {"real": case.latents, "condition": case.condition, "neg_condition": case.empty}

    def network(self) -> nn.Module:
        base, role = importlib.import_module("fastgen.networks.network").FastGenNetwork, self.case.denoiser

        class Network(base):
            def __init__(self) -> None:
                super().__init__(net_pred_type="flow", schedule_type="rf")
                self.role = role.on(copied(role.network))
                self.inner = self.role.network

            def forward(self, x_t, t, condition=None, fwd_pred_type=None, **_):
                raw, convert = self.role(x_t, t, condition).raw, self.noise_scheduler.convert_model_output
                return convert(x_t, raw, t, src_pred_type="flow", target_pred_type=fwd_pred_type or "flow")

        return Network().to(self.case.device)

    def model(self, name: str, config_of: str, networks: tuple[str, ...], trained: tuple[str, ...], **keys: Any) -> Any:
        """FastGen's class of that name with these networks."""
        own, kind = self, getattr(importlib.import_module("fastgen.methods"), name)

        class Model(kind):
            def build_model(self) -> None:
                for role in networks:
                    setattr(self, role, own.network().requires_grad_(role in trained))

        config = importlib.import_module(f"fastgen.configs.methods.{config_of}").ModelConfig()
        dmd2 = importlib.import_module("fastgen.configs.methods.config_dmd2").ModelConfig()
        config.net_optimizer = config.fake_score_optimizer = dmd2.net_optimizer  # AdamW, as all others here
        config.net_optimizer.fused = True
        config.device, config.precision = self.case.device, "float32"
        config.precision_amp = "bfloat16" if self.precision == "bf16" else None
        config.guidance_scale, config.input_shape = SCALE, list(self.case.shape)
        for key, value in keys.items():
            setattr(config, key, value)
        return Model(config)

    def runs(self, model: Any, *networks: str) -> tuple[Callable[[], None], Callable[[], Tensor]]:
        """(a step of one iteration for each network, the first one's loss)."""
        model.on_train_begin()
        model.init_optimizers()

        def step() -> None:
            for iteration, name in enumerate(networks):
                model.optimizers_zero_grad(iteration)
                losses, _ = model.single_train_step(self.data, iteration)
                losses["total_loss"].backward()
                nn.utils.clip_grad_norm_(getattr(model, name).parameters(), 1.0)
                model.optimizers_schedulers_step(iteration)

        return step, lambda: model.single_train_step(self.data, 0)[0]["total_loss"]

    def dmd2(self) -> tuple[Callable[[], None], Callable[[], Tensor]]:
        trained = ("net", "fake_score")
        keys = {"gan_loss_weight_gen": 0.0, "student_update_freq": 2, "student_sample_steps": 4}
        model = self.model("DMD2Model", "config_dmd2", (*trained, "teacher"), trained, **keys)
        model.config.sample_t_cfg.t_list = [0.999, 0.75, 0.5, 0.25, 0.0]
        return self.runs(model, *trained)

    def lcm(self) -> tuple[Callable[[], None], Callable[[], Tensor]]:
        """Consistency distillation from the teacher; its target is the student itself, not a slow copy of it."""
        model = self.model("CMModel", "config_cm", ("net", "teacher"), ("net",), use_ema=False)
        model.loss_config.use_cd, model.ratio = True, 0.9
        model.sample_t_cfg.time_dist_type = "uniform"
        return self.runs(model, "net")


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(steps: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turns."""
    for function in steps.values():
        function()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, function in steps.items():
            began = now(device)
            function()
            seconds[name].append(now(device) - began)
    return seconds


def rows(name: str, method: str, case: Case, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each implementation of ``method`` on the network called ``name``."""
    trainer = make_trainer(case, method, arguments.precision, folder, arguments.compile)
    bf16 = arguments.precision == "bf16"

    def precision():
        # Without its cache, as in the trainer: gradients would miss weights that a rollout has cast.
        return torch.autocast(case.device.type, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext()

    number = step_of_one_rollout(case)
    steps: dict[str, Callable[[], Any]] = {"floor": getattr(Floor(trainer, case, precision), method)}
    losses: dict[str, Callable[[], Tensor]] = {}
    train = case.recipe.train

    def our_step(checkpointing: bool | str) -> None:
        train.gradient_checkpointing = checkpointing
        trainer.step(number)

    def our_loss() -> Tensor:
        with precision():
            return sum(trainer.method.losses("student", case.batch(number, 0, case.size)).values())

    for kind, checkpointing in (("stepdistill", False), ("elementwise", "elementwise")):
        if not (checkpointing and arguments.compile):
            steps[kind], losses[kind] = partial(our_step, checkpointing), our_loss
    if case.train == "full":
        plain = Plain(case, precision)
        steps["plain"] = getattr(plain, method)

        def plain_loss():
            with precision():
                return getattr(plain, f"{method}_loss")()[0]

        losses["plain"] = plain_loss
    if arguments.fastgen and case.train == "full":
        rival = FastGen(arguments.fastgen, case, arguments.precision)
        steps["fastgen"], losses["fastgen"] = getattr(rival, method)()
    seconds = measure(steps, case.device, arguments.repeats)
    found = []
    for kind, loss in losses.items():
        with HostReads() as reads:
            steps[kind]()
        with moving(trainer.parameters["student"]) if loss is our_loss else nullcontext():
            kept = kept_mib(loss, kind == "elementwise")
            with elementwise_recomputed() if kind == "elementwise" else nullcontext():
                peak = peak_mib(loss, case.device, arguments.compile)
        ratios = [own / floor for own, floor in zip(seconds[kind], seconds["floor"], strict=True)]
        found.append(
            {
                "case": f"{method} {name} {kind}",
                "seconds": round(statistics.median(seconds[kind]), 5),
                "floor_seconds": round(statistics.median(seconds["floor"]), 5),
                "ratio_to_floor": round(statistics.median(ratios), 4),
                "activations_mib": kept,
                "peak_mib": peak,
                "host_reads": reads.count,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where to write the rows")
    parser.add_argument("--networks", nargs="+", default=["unet", "dit"], choices=["unet", "dit", "sd15", "sdxl"])
    parser.add_argument("--methods", nargs="+", default=["dmd2", "lcm"], choices=["dmd2", "lcm"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--tiny", action="store_true", help="shrink the networks: a dry run")
    parser.add_argument("--fastgen", type=Path, help="a checkout of NVlabs/FastGen to compare with")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[dict[str, Any]] = []
    setting = {key: getattr(arguments, key) for key in ("batch_size", "repeats", "precision", "compile", "tiny")}
    report = {"device": device_name(device), "libraries": library_versions(), **setting, "rows": found}
    with tempfile.TemporaryDirectory() as folder:
        for network in arguments.networks:
            for method in arguments.methods:
                case = make_case(network, arguments.batch_size, device, arguments.tiny)
                for row in rows(network, method, case, arguments, Path(folder)):
                    found.append(row)
                    print(json.dumps(row), flush=True)
                    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
