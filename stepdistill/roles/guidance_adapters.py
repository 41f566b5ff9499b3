"""Small networks that turn a conditional network into its guided self, fastened to it by hooks.

The network stays what it is, class, weights and call: an adapter listens to its embeddings and adds to what its layers
(or the whole network) return. Everything that is added carries the factor w - 1, so that w = 1 is always the network
alone; where the guided output is what is added to, uncond + w (cond - uncond), that is its exact form.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepdistill.diffusion.nested import first_tensor, with_first_tensor
from stepdistill.errors import InputError
from stepdistill.roles.added import Adapted
from stepdistill.roles.views import plain_network

NAME = "guidance_adapter"
"""The name under which a network holds the adapter that is fastened to it."""


class GuidanceAdapter(nn.Module, ABC):
    """What all adapters share: w, and a context (B, width) of w, time and condition.

    Time and condition come from the network's own embeddings: the output of its time embedding, together with the class
    or the pooled text where the network adds them there, and the mean text token where it has cross-attention.

    Args:
        network: the network to be guided, or a view of it; its layers are found by their diffusers classes.
        scale: the w of calls that name none.
        width: of the hidden layers.
    """

    kind: str

    def __init__(self, network: nn.Module, scale: float, width: int):
        super().__init__()
        if isinstance(getattr(_stock(network), NAME, None), GuidanceAdapter):
            raise InputError(f"this {type(_stock(network)).__name__} has a guidance adapter already")
        self.width = width
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.w: Tensor | None = None
        self.seen: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        _, features = _embedding(network)
        self.time = nn.Linear(features, width)
        self.strength = nn.Linear(1, width)
        cross = _cross_attentions(network)
        self.text = nn.Linear(cross[0].to_k.in_features, width) if cross else None

    def fasten(self, network: nn.Module) -> None:
        """From now on every call of ``network`` (or of this view of it) is adapted."""
        handles = [_embedding(network)[0].register_forward_hook(self._see_time)]
        if cross := _cross_attentions(network):
            handles.append(cross[0].register_forward_pre_hook(self._see_text, with_kwargs=True))
        self.handles = [*handles, *self.hooks(network), network.register_forward_hook(self._forget)]

    def release(self) -> None:
        """Undo :meth:`fasten`."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.w = [], None
        self.seen.clear()

    @abstractmethod
    def hooks(self, network: nn.Module) -> list[RemovableHandle]:
        """What this adapter registers on ``network``."""

    def context(self) -> Tensor:
        """(B, width) of the running call."""
        weight = self.time.weight
        hidden = self.time(self.seen["time"].to(weight.dtype)) + self.strength(self.excess().to(weight.dtype))
        if self.text is not None:
            hidden = hidden + self.text(self.seen["text"].to(weight.dtype).mean(1))
        return F.silu(hidden)

    def excess(self) -> Tensor:
        """w - 1, (B, 1) or (1, 1)."""
        return (self.scale if self.w is None else self.w.to(self.scale)).reshape(-1, 1) - 1

    def _see_time(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self.seen["time"] = first_tensor(output)

    def _see_text(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.seen["text"] = args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]

    def _forget(self, *_: Any) -> None:
        self.seen.clear()


class AttentionAdapter(GuidanceAdapter):
    """Adds a small MLP of (hidden tokens, w, time, condition) to every attention layer's output (AGD, additive form).

    Adapter Guidance Distillation (Jensen & Sadat 2025). The cross-attention layers where the network has any, all
    attention layers otherwise.
    """

    kind = "attention"

    def __init__(self, network: nn.Module, scale: float, width: int):
        super().__init__(network, scale, width)
        layers = _attentions(network)
        if not layers:
            raise InputError(f"{type(_stock(network)).__name__} has no attention layers that could be adapted")
        sizes = [layer.to_q.in_features for layer in layers]
        self.tokens = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.contexts = nn.ModuleList(nn.Linear(width, width) for _ in sizes)
        self.outlets = nn.ModuleList(_zeroed(nn.Linear(width, size)) for size in sizes)

    def hooks(self, network: nn.Module) -> list[RemovableHandle]:
        return [
            layer.register_forward_hook(partial(self._add, index), with_kwargs=True)
            for index, layer in enumerate(_attentions(network))
        ]

    def _add(self, index: int, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        tokens = args[0] if args else kwargs["hidden_states"]
        inner = self.tokens[index](tokens) + self.contexts[index](self.context())[:, None]
        added = self.excess()[:, None] * self.outlets[index](F.silu(inner))
        return with_first_tensor(output, first_tensor(output) + added.to(tokens.dtype))


class OutputGuide(GuidanceAdapter):
    """Adds a small convolutional network's output to the network's: output + (w - 1) guide(x_t, output, context).

    Beside the network rather than inside it, so that it also guides a fine-tune of that network (plug-and-play guide
    model, Hsiao et al. 2024, in its output-additive form). For latents (B, C, H, W).
    """

    kind = "output"

    def __init__(self, network: nn.Module, scale: float, width: int):
        super().__init__(network, scale, width)
        channels = _stock(network).config.in_channels
        self.inlet = nn.Conv2d(2 * channels, width, 3, padding=1)
        self.layers = nn.ModuleList(_Residual(width) for _ in range(2))
        self.outlet = _zeroed(nn.Conv2d(width, channels, 3, padding=1))

    def hooks(self, network: nn.Module) -> list[RemovableHandle]:
        return [network.register_forward_hook(partial(self._add, _sample_name(network)), with_kwargs=True)]

    def _add(self, sample: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x_t, raw = args[0] if args else kwargs[sample], first_tensor(output)
        if not self.seen:
            # The network was not run (its forward is replaced for a moment, as where latents are only decoded).
            return output
        if x_t.ndim != 4:
            raise InputError(f"a guide is for latents (B, C, H, W), found {list(x_t.shape)}")
        # A learned variance, in channels of its own, stays as it is.
        mean, variance = raw[:, : x_t.shape[1]], raw[:, x_t.shape[1] :]
        dtype, context = self.outlet.weight.dtype, self.context()
        hidden = self.inlet(torch.cat([x_t, mean], 1).to(dtype))
        for layer in self.layers:
            hidden = layer(hidden, context)
        added = self.excess()[..., None, None] * self.outlet(F.silu(hidden))
        return with_first_tensor(output, torch.cat([mean + added.to(raw.dtype), variance], 1))


class _Residual(nn.Module):
    """Two convolutions, the second after a scale and shift of the context."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, context: Tensor) -> Tensor:
        scale, shift = self.modulation(context)[..., None, None].chunk(2, 1)
        inner = self.first(F.silu(hidden)) * (1 + scale) + shift
        return hidden + self.second(F.silu(inner))


ADAPTERS: dict[str, type[GuidanceAdapter]] = {adapter.kind: adapter for adapter in (AttentionAdapter, OutputGuide)}


class WithGuidanceAdapter(Adapted):
    """A network and an adapter that is fastened to it only while this is called: its weights serve other roles too."""

    def __init__(self, network: nn.Module, adapter: GuidanceAdapter):
        super().__init__(network)
        self.adapter = adapter

    def forward(self, *arguments, guidance_scale: Tensor | None = None, **keywords):
        self.adapter.fasten(self.network)
        self.adapter.w = guidance_scale
        try:
            return self.network(*arguments, **keywords)
        finally:
            self.adapter.release()

    def plain(self) -> nn.Module:
        """A copy of the stock network with the adapter fastened to it."""
        stock = plain_network(self.network)
        fasten(stock, copy.deepcopy(self.adapter))
        return stock


def fasten(network: nn.Module, adapter: GuidanceAdapter) -> None:
    """Make ``adapter`` a part of ``network``, in place of an earlier one."""
    if (earlier := fastened(network)) is not None:
        earlier.release()
    network.add_module(NAME, adapter)
    adapter.eval().fasten(network)


def fastened(network: Any) -> GuidanceAdapter | None:
    """The adapter that is a part of ``network``, if any."""
    adapter = getattr(network, NAME, None) if isinstance(network, nn.Module) else None
    return adapter if isinstance(adapter, GuidanceAdapter) else None


def _zeroed(layer: nn.Module) -> nn.Module:
    """Adapters start as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _stock(network: nn.Module) -> nn.Module:
    """The network inside the views of it."""
    while "backbone" in network._modules:
        network = network.backbone
    return network


def _sample_name(network: nn.Module) -> str:
    """The first argument of a diffusers denoiser is x_t, whatever its name."""
    return list(inspect.signature(type(_stock(network)).forward).parameters)[1]


def _attentions(network: nn.Module) -> list[nn.Module]:
    return _cross_attentions(network) or [module for module in network.modules() if _is_attention(module)]


def _is_attention(module: nn.Module) -> bool:
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    return isinstance(module, Attention | AttentionModuleMixin)


def _cross_attentions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if getattr(module, "is_cross_attention", False)]


def _embedding(network: nn.Module) -> tuple[nn.Module, int]:
    """The first module that embeds the time, and its output's width; with what the network adds to it at once.

    Raises:
        InputError: there is none.
    """
    from diffusers.models.embeddings import TimestepEmbedding

    for name, module in network.named_modules():
        if isinstance(module, TimestepEmbedding):
            around = network.get_submodule(name.rpartition(".")[0])
            # A module that holds the time embedding and nothing like a layer combines it with class or pooled text.
            whole = any(map(_is_attention, around.modules()))
            return module if whole else around, module.linear_2.out_features
    raise InputError(f"{type(_stock(network)).__name__} has no time embedding that an adapter could read")
