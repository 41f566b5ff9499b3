"""Stock schedulers for students, configured from the teacher's own: same table or shift, a grid of few useful steps.

Flow pipelines either hand their scheduler sigmas 1 .. 1/n or leave the grid to it. Left alone, its grid ends at the
smallest sigma it knows (.009 at shift 3), where a step changes nothing; ``shift_terminal`` says where it ends instead.
"""

from typing import Any

import torch
from torch import Tensor

from stepdistill.diffusion.schedule import FlowSchedule, ScaledEDMSchedule, VPSchedule
from stepdistill.diffusion.scheduler_tables import is_sigma
from stepdistill.errors import InputError

_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")
LEARNED = ("learned", "learned_range")
"""The variance_type of schedulers that take the network's variance beside its prediction."""

_DYNAMIC = (
    "use_dynamic_shifting",
    "time_shift_type",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
)


def flow_settings(source: Any, schedule: FlowSchedule) -> dict[str, Any]:
    """Arguments of a flow scheduler with the shift of ``schedule``, left to the pipeline where that computes it.

    Args:
        source: the teacher's scheduler.
    """
    settings: dict[str, Any] = {"num_train_timesteps": schedule.train_timesteps}
    if schedule.inverted:
        settings["invert_sigmas"] = True
    if schedule.dynamic:
        return settings | {name: source.config[name] for name in _DYNAMIC if source.config.get(name) is not None}
    return settings | {"shift": schedule.shift}


def cut_flow_scheduler(schedule: FlowSchedule) -> Any:
    """The scheduler of Euler's steps on flow whose timesteps are integers: DPM-Solver++ of first order."""
    from diffusers import DPMSolverMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": schedule.shift}
    return DPMSolverMultistepScheduler(num_train_timesteps=schedule.train_timesteps, solver_order=1, **flow)


def vp_scheduler(kind: type, source: Any, schedule: VPSchedule, start: int | None = None, **settings: Any) -> Any:
    """A scheduler of ``kind`` with the table and prediction type of ``source``, which clips nothing.

    Args:
        schedule: the teacher's; its table is the one to be met.
        start: the table's last entry to keep, at which a run then starts; None: all of it.
        settings: further arguments of ``kind``.

    Raises:
        InputError: ``kind`` has no config with this table.
    """
    config, table = source.config, schedule.alphas_cumprod
    # Without effect on any of the grids here, but Stable Diffusion's pipelines rewrite a 0, with a warning.
    common = {"prediction_type": config["prediction_type"], "steps_offset": config.get("steps_offset", 0)} | settings
    common["clip_sample"] = False
    try:
        made = kind(**{name: config[name] for name in _BETAS if config.get(name) is not None}, **common)
        own = _same(made.alphas_cumprod, table)
    except NotImplementedError:  # its beta_schedule is one of the source's class alone (Shap-E's "exp")
        own = False
    if own and start is None:
        return _with_variance_type(made, source)
    # CogVideoX and CogView3 shift their table's signal-to-noise ratio after it is made of betas.
    betas = made.betas if own else _betas(table)
    trained = betas[: None if start is None else start + 1].tolist()
    made = kind(trained_betas=trained, num_train_timesteps=len(trained), **common)
    if not _same(made.alphas_cumprod, table[: len(trained)]):
        raise InputError(f"schedule: no config of {kind.__name__} has the noise table of {type(source).__name__}")
    return _with_variance_type(made, source)


def _with_variance_type(made: Any, source: Any) -> Any:
    """The scheduler with what a pipeline asks that of ``source``: DeepFloyd whether it takes a learned variance."""
    if isinstance(kind := source.config.get("variance_type"), str) and "variance_type" not in made.config:
        made.register_to_config(variance_type=kind)
    return made


def without_learned_variance(scheduler: Any) -> Any:
    """The scheduler, or one like it that takes the mean alone where it takes the network's variance beside it.

    A pipeline leaves off the variance then. Students are trained to predict the mean.
    """
    if getattr(scheduler, "config", {}).get("variance_type") not in LEARNED:
        return scheduler
    return type(scheduler).from_config(scheduler.config, variance_type="fixed_small")


def edm_scheduler(source: Any, schedule: ScaledEDMSchedule, steps: int) -> Any:
    """EDM's Euler scheduler, or plain Euler on continuous time where the network has no preconditioning of its own.

    Its ``steps`` stand at even t; left alone the last one would start at the smallest sigma, where nothing changes.

    Raises:
        InputError: it is left alone, and there is one step.
    """
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    levels, config = schedule.levels, source.config
    if is_sigma(source):  # its pipeline sets both ends and begins the last step where it ends
        if steps == 1:
            raise InputError(
                f"student.steps: expected at least 2 under {type(source).__name__} with sigmas up to "
                f"{levels.sigma_max:g}, whose last step changes nothing, found 1"
            )
        return type(source).from_config(config)
    last = levels.sigma_min if steps == 1 else levels.sigma(torch.tensor(1 / steps)).item()
    ends = {"sigma_min": last, "sigma_max": levels.sigma_max, "prediction_type": config["prediction_type"]}
    if "sigma_data" in config:
        return EDMEulerScheduler(**ends, sigma_data=schedule.data_std, rho=levels.rho)
    # "leading" concerns the deviation of the first sample alone.
    return EulerDiscreteScheduler(
        **ends, timestep_type="continuous", use_karras_sigmas=True, timestep_spacing="leading"
    )


def _betas(alphas_cumprod: Tensor) -> Tensor:
    """The betas whose cumulative product of 1 - beta is the table (N,)."""
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return (1 - alphas_cumprod / before).clamp(0, 1)


def _same(actual: Tensor, table: Tensor) -> bool:
    return actual.shape == table.shape and torch.allclose(actual.double(), table, rtol=1e-5, atol=1e-9)


def as_network_input(scheduler: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """x_t: the scheduler's sample (B, ...) as it scales it for the network, if it does, or its pipeline (Cosmos 2)."""
    if is_sigma(scheduler):
        sigma = torch.as_tensor(timestep).double().to(sample.device) / scheduler.config["num_train_timesteps"]
        return sample * (sigma**2 + 1).rsqrt().to(sample)
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def noise_scale(scheduler: Any) -> float:
    """The deviation of the noise that a run starts from."""
    return float(scheduler.config["sigma_max"] if is_sigma(scheduler) else getattr(scheduler, "init_noise_sigma", 1.0))


def stepped_timesteps(scheduler: Any) -> Tensor:
    """The timesteps (N,) of a grid at which a step begins: TrigFlow's has the end of its last one too."""
    ended = scheduler.config.get("prediction_type") == "trigflow"
    return scheduler.timesteps[:-1] if ended else scheduler.timesteps
