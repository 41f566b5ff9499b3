"""Stock fast solvers for a teacher without training: the baselines that a student has to beat."""

from typing import Any

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from stepdistill.diffusion.schedule import from_scheduler

_SHIFT_OF_A_SIZE = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
"""What pipelines read of a flow scheduler's config, whichever it is, to tell it the shift of a picture's size."""


def stock_solvers(scheduler: Any) -> dict[str, Any]:
    """diffusers' fast solvers for a model that was trained with ``scheduler``, by display name.

    All run on trailing time steps: the first is pure noise, which a few steps cannot do without. Empty where diffusers
    has none that drives such a network.
    """
    config = dict(scheduler.config)
    schedule, _ = from_scheduler(scheduler)
    if schedule.name == "flow":
        common = {"num_train_timesteps": schedule.train_timesteps}
        if config.get("use_dynamic_shifting"):  # the pipeline tells the shift with the picture's size
            common |= {name: config[name] for name in ("use_dynamic_shifting", "time_shift_type") if name in config}
        shifting = {name: config[name] for name in _SHIFT_OF_A_SIZE if name in config}
        flow = {**common, "use_flow_sigmas": True, "flow_shift": schedule.shift, "prediction_type": "flow_prediction"}
        own = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        settings = config if own else common | {"shift": schedule.shift}
        if schedule.inverted:
            return {"Euler": FlowMatchEulerDiscreteScheduler.from_config(settings)}
        solvers = {
            "Euler": FlowMatchEulerDiscreteScheduler.from_config(settings),
            "DPM-Solver++": DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++", solver_order=2),
            "UniPC": UniPCMultistepScheduler(**flow, solver_order=2),
        }
        for solver in solvers.values():
            solver.register_to_config(**shifting)
        return solvers
    if schedule.name == "edm":
        stock = {"Euler": EDMEulerScheduler, "DPM-Solver++": EDMDPMSolverMultistepScheduler}
        return {name: kind.from_config(config) for name, kind in stock.items()} if "sigma_data" in config else {}
    trailing = {"timestep_spacing": "trailing", "thresholding": False}
    solver = {**trailing, "solver_order": 2, "lower_order_final": True}
    return {
        "DDIM": DDIMScheduler.from_config(config, **trailing, clip_sample=False, set_alpha_to_one=True),
        "DPM-Solver++": DPMSolverMultistepScheduler.from_config(config, **solver, algorithm_type="dpmsolver++"),
        "UniPC": UniPCMultistepScheduler.from_config(config, **solver),
    }


def solver_runs(scheduler: Any, guidance: float, nfe: int) -> list[tuple[str, Any, int, float]]:
    """How a teacher can spend ``nfe`` network passes: (name, solver, steps, w), and with guidance in half the steps."""
    runs = []
    for name, solver in stock_solvers(scheduler).items():
        runs.append((name, solver, nfe, 1.0))
        if guidance != 1 and nfe >= 2:
            runs.append((f"{name} w={guidance:g}", solver, nfe // 2, guidance))
    return runs
