"""LoRA adapters, injected by peft into the model's own layers: what is trained, the switch, and what is exported.

The model keeps its class and its forward; an adapted layer holds `base_layer`, `lora_A` and `lora_B`. With the adapters off it
is the base model bit for bit, so one copy of the weights serves actor and reference, or critic and reward model. Weights are
exported merged (W + alpha/rank B A, computed apart; the model in training is not touched), and as a PEFT adapter beside.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_core.errors import ConfigError
from rlhf_core.partitioned import shape_of
from rlhf_core.specs import LoRASpec

ADAPTER = "default"


@dataclass(frozen=True)
class Weight:
    """One weight of a saved model.

    Attributes:
        name: as in the state dict of the model without adapters.
        parts: the tensors it is made of; gathered together at ZeRO-3.
        make: the weight from the parts.
    """

    name: str
    parts: Sequence[Tensor]
    make: Callable[..., Tensor]


def add_lora(model: nn.Module, spec: LoRASpec, field: str, seed: int = 0) -> None:
    """Inject adapters and freeze what the spec does not train; a `ValueModel`'s head is always trained.

    Args:
        model: changed in place.
        spec: rank, layers, what else is trained.
        field: where the spec stands in the configuration, for messages.
        seed: of the adapters' first weights, which depend on nothing that happened before.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linears = linear_layers(model)
    known = {_last(name) for name in linears}
    if spec.quantize and not any(hasattr(p, "quant_state") for p in model.parameters()):
        raise ConfigError(f"{field}.quantize: {spec.quantize} must be applied when the model is loaded")
    targets = set(spec.targets) if spec.targets else known
    if unknown := sorted(targets - known):
        raise ConfigError(
            f"{field}.targets: {unknown[0]!r} is no linear layer of this model's blocks; there are {', '.join(sorted(known))}"
        )
    chosen = [name for name in linears if _last(name) in targets]
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=chosen)  # pyright: ignore
    config.fan_in_fan_out = any(_is_conv(linears[name]) for name in chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    extra = _also_trained(model, spec)
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name or name in extra or name == "score.weight"
        parameter.requires_grad_(trained)


def blocks_of(model: nn.Module) -> str:
    """Name of the list of transformer blocks: the first list of modules."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def _is_conv(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight lies the other way."""
    return type(module).__name__ == "Conv1D"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers of the blocks by name, in order: the default targets of any family."""
    blocks = blocks_of(model)
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(f"{blocks}.") and (isinstance(module, nn.Linear) or _is_conv(module))
    }


def _also_trained(model: nn.Module, spec: LoRASpec) -> set[str]:
    """Names of the parameters besides the adapters that the spec trains."""
    embeddings = {
        f"{name}.{p}"
        for name, m in model.named_modules()
        if isinstance(m, nn.Embedding)
        for p, _ in m.named_parameters(recurse=False)
    }
    kinds: set[str] = set()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if name in embeddings:
            kind = "embeddings"
        elif name.endswith(".bias"):
            kind = "biases"
        else:
            kind = "norms" if len(shape_of(parameter)) == 1 else ""
        if kind in spec.also_train:
            kinds.add(name)
    return kinds


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapted layers with their names."""
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


@contextlib.contextmanager
def adapters_off(adapted: Sequence[Any]) -> Iterator[None]:
    """The base model for as long as this lasts. Only the switch moves: peft's own would also stop the adapters' gradients."""
    for layer in adapted:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in adapted:
            layer._disable_adapters = False


class WithoutAdapters:
    """A trained model with adapters seen as the model it started from: the reference, or the reward model.

    Attributes:
        module: the model inside, as in a DeepSpeed engine.
        head: the head that the model started from, where the trained one has moved (`ValueModel`), else None.
    """

    def __init__(self, engine: Any, head: nn.Module | None = None) -> None:
        self.engine = engine
        self.module = engine.module
        self.head = head
        self._adapted = [layer for _, layer in layers(self.module)]

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """A forward pass with the adapters off and the first head."""
        with adapters_off(self._adapted), self._first_head():
            return self.engine(*args, **inputs)

    @contextlib.contextmanager
    def _first_head(self) -> Iterator[None]:
        trained = getattr(self.module, "score", None)
        try:
            if self.head is not None:
                self.module.score = self.head
            yield
        finally:
            if self.head is not None:
                self.module.score = trained

    def eval(self) -> "WithoutAdapters":
        """Switch dropout off in the shared model."""
        self.engine.eval()
        return self


def gathered(parts: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Weights are whole in this `with` block, where ZeRO-3 has partitioned some; collective then."""
    divided = [part for part in parts if hasattr(part, "ds_id")]
    return deepspeed.zero.GatheredParameters(divided, enabled=bool(divided))  # pyright: ignore[reportReturnType]


def whole(parameter: Tensor) -> Tensor:
    """A copy of a whole weight on every rank, gathered where ZeRO-3 has partitioned it."""
    with gathered([parameter]):
        return parameter.detach().clone()


def weights(model: nn.Module) -> list[Weight]:
    """The weights of a saved model, tied ones once, in the order of the model; adapters merged.

    Buffers that belong to the state dict come last.
    """
    adapted = dict(layers(model))
    found: list[Weight] = []
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".base_layer.")
        layer = adapted.get(owner) if leaf == "weight" else None
        plain = name.replace(".base_layer.", ".")
        if layer is None:
            found.append(Weight(plain, [parameter], unquantized))
        else:
            found.append(merged(plain, layer))
    kept = model.state_dict().keys()
    found += [Weight(n, [b], lambda w: w) for n, b in model.named_buffers() if n in kept]
    return found


def unquantized(weight: Tensor) -> Tensor:
    """The weight as it computes; one that bitsandbytes keeps in 4 bits is expanded (not tested: needs a GPU)."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore

    return dequantize_4bit(weight.data, state)


def merged(name: str, layer: Any) -> Weight:
    """The weight of an adapted layer with its adapter in it: W + alpha/rank B A, summed in fp32."""
    scale, flip = layer.scaling[ADAPTER], bool(layer.fan_in_fan_out)

    def make(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        w, delta = unquantized(w), scale * (b.float() @ a.float())
        return (w.float() + (delta.T if flip else delta)).to(w.dtype)

    return Weight(name, [layer.base_layer.weight, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight], make)


def adapter_weights(model: nn.Module) -> list[Weight]:
    """The adapters' weights, and what else was trained, under PEFT's names.

    PEFT keeps whole modules besides the adapters, so a norm whose weight was trained is written with its bias. Biases of
    adapted layers have no module of their own and go straight into the base layer. A tied weight is written under each name,
    because PEFT copies the modules it keeps.
    """
    prefix = getattr(getattr(model, "trunk", None), "base_model_prefix", None)
    named = list(model.named_parameters(remove_duplicate=False))
    trained = {name for name, p in named if p.requires_grad and ".lora_" not in name}
    modules = {name.rpartition(".")[0] for name in trained if ".base_layer." not in name}
    found: list[Weight] = []
    for name, parameter in named:
        if not parameter.requires_grad and name.rpartition(".")[0] not in modules:
            continue
        plain = name.replace(f".{ADAPTER}.", ".")
        if prefix and plain.startswith("trunk."):
            plain = prefix + plain.removeprefix("trunk")
        found.append(Weight(f"base_model.model.{plain}", [parameter], lambda w: w))
    return found


def write_adapter(folder: Path, state: dict[str, Tensor], model: nn.Module, spec: LoRASpec, base: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as `peft.PeftModel.from_pretrained` reads them.

    Args:
        folder: made if needed.
        state: of `adapter_weights`, gathered.
        model: with the adapters.
        spec: their sizes.
        base: name or path of the model that the adapter belongs to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scalar = hasattr(model, "score")
    adapted = layers(model)
    prefix = getattr(getattr(model, "trunk", None), "base_model_prefix", "")
    names = [prefix + n.removeprefix("trunk") if scalar else n for n, _ in adapted]
    others = [n.removeprefix("base_model.model.") for n in state if ".lora_" not in n]
    extra = sorted({n.rpartition(".")[0] for n in others if ".base_layer." not in n})
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": names,
        "fan_in_fan_out": bool(adapted[0][1].fan_in_fan_out),
        "bias": "lora_only" if any(".base_layer." in n for n in others) else "none",
        "modules_to_save": extra or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    save_file(
        {k: v.clone().contiguous() for k, v in state.items()},
        str(folder / "adapter_model.safetensors"),
        {"format": "pt"},
    )


def trained(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(shape_of(p).numel() for p in model.parameters() if p.requires_grad)
