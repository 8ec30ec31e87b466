"""LoRA adapters on a base model: how they begin, and which part of a version a site trains in a round.

A version holds each layer's pair at the recipe's rank, and with some rules more (see protos/adapters.py). The site's
adapter holds what it works with: the leading columns of B and rows of A, as many as its rank. Everything else of the
version lies in a second, frozen adapter beside it, which PEFT adds in the forward pass as it adds the first:

    the other columns      They stay part of the model. HetLoRA (Cho et al. 2024, arXiv:2401.06432) and FlexLoRA (Bai et
                           al. 2024, arXiv:2402.11505) cut them off at a site of lower rank; its columns then learn to
                           stand in for the missing ones, and what only others train fades from mean to mean. Here each
                           site takes a step of the model that all have, on the columns that it can afford. What it
                           saves is gradients, optimizer state and bytes; a frozen column costs next to nothing.
    the fold               What FLoRA and FedEx-LoRA add to the frozen weights. It needs no reload of the base, and a
                           base in 4 bits could not take it up exactly.

So nothing is reloaded between rounds, whatever the rule, and no weight of the base model is ever touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from protos import jobspec
from protos.adapters import Factor, split_name, trained_factors
from protos.errors import InvalidInput

# PEFT's names of the adapter that is trained, and of the frozen one.
TRAINED, BESIDE = "default", "beside"
# Of the randomized SVD (Halko et al. 2011, arXiv:0909.4061).
OVERSAMPLED_DIRECTIONS = 8
SUBSPACE_ITERATIONS = 4


class WithCore(nn.Linear):
    """B as fed-sb has it: x -> B (R x), of which only R is trained."""

    def __init__(self, outer: Tensor) -> None:
        super().__init__(outer.shape[1], outer.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(outer)
        self.core = nn.Parameter(torch.zeros(outer.shape[1], outer.shape[1], device=outer.device))

    def forward(self, input: Tensor) -> Tensor:
        return linear(linear(input, self.core), self.weight)


def with_adapters(
    network: PreTrainedModel, *, spec: jobspec.JobSpec, peft_type: str, missing: Collection[str], name: str
) -> PeftModel:
    """Adapters on the targets, as version 0 has them; the head and whatever else the base model lacks goes whole.

    InvalidInput: the base model has no such targets.
    """
    method = spec.method
    assert isinstance(method, jobspec.Lora)
    new_modules = set()
    for key in missing:
        top, owner = key.partition(".")[0], key.rpartition(".")[0]
        new_modules.add(owner if top == network.base_model_prefix else top)
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        use_rslora=method.scale == "rslora",
        target_modules="all-linear" if method.targets == ("all-linear",) else list(method.targets),
        modules_to_save=sorted(new_modules) or None,
        task_type=peft_type,
    )
    try:
        adapted = get_peft_model(network, config)
    except ValueError as error:
        linears = sorted({path.rpartition(".")[2] for path, m in network.named_modules() if isinstance(m, nn.Linear)})
        raise InvalidInput(
            f"The base model {name!r} has no layers named {', '.join(method.targets)} that can take an adapter.",
            hint=f"Choose targets under [method] in the recipe from: {', '.join(linears)}.",
        ) from error
    # adapter_config.json shall name the base model, not the site's path, and have one content: sets have no order.
    written: Any = adapted.peft_config[TRAINED]
    written.base_model_name_or_path = name
    written.target_modules = sorted(written.target_modules)
    if spec.aggregation.rule == "fed-sb":
        for layer in _layers(adapted).values():
            _span_base_weight(layer)
    if spec.aggregation.rule in ("ffa-lora", "fed-sb"):
        _set_trained(adapted, trained_factors(spec, round_number=1))
    return adapted


def leave_casts_to_autocast(network: nn.Module) -> None:
    """PEFT turns each adapter's input into float32, and keeps it for the way back; autocast turns it into bfloat16."""
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def federated(network: nn.Module) -> dict[str, Tensor]:
    """What travels, by its name in a version, in canonical order; each tensor is the parameter's own memory."""
    if isinstance(network, PeftModel):
        found = get_peft_model_state_dict(network, save_embedding_layers=False)
        tensors = {name.replace(".lora_B.core", ".lora_R.weight"): tensor for name, tensor in found.items()}
    else:
        tensors = {name: tensor.detach() for name, tensor in network.named_parameters() if tensor.requires_grad}
    return dict(sorted(tensors.items()))


@torch.no_grad()
def arrange(
    network: PeftModel, version: Mapping[str, Tensor], *, spec: jobspec.JobSpec, round_number: int, rank: int
) -> dict[str, Tensor]:
    """Puts a version's adapters into the model, `rank` columns of them to be trained as the round's rule says.

    Returns what the round trains, by name: the tensors of the update, which are the parameters' own memory. Tensors of
    no adapter are not put, only returned. `version` has been checked: it fits.
    """
    beside = {}
    for path, layer in _layers(network).items():
        a, b = version[f"{path}.lora_A.weight"], version[f"{path}.lora_B.weight"]
        core = version.get(f"{path}.lora_R.weight")
        _put(layer.lora_A[TRAINED], "weight", a[:rank])
        _put(layer.lora_B[TRAINED], "weight", b[:, :rank])
        rest_a, rest_b = a[rank:], b[:, rank:]
        if core is not None:
            _put(layer.lora_B[TRAINED], "core", core[:rank, :rank])
            if rank < len(core):
                others = core.clone()
                others[:rank, :rank] = 0
                rest_a, rest_b = a, b @ others
        fold_a, fold_b = version.get(f"{path}.fold_A.weight"), version.get(f"{path}.fold_B.weight")
        if fold_a is not None and fold_b is not None:
            rest_a, rest_b = torch.cat([rest_a, fold_a]), torch.cat([rest_b, fold_b], dim=1)
        beside[path] = rest_a, rest_b
    _put_beside(network, beside, spec=spec)
    trained = trained_factors(spec, round_number=round_number)
    _set_trained(network, trained)
    return {name: tensor for name, tensor in federated(network).items() if split_name(name)[1] in ("", *trained)}


def _put_beside(network: PeftModel, pairs: Mapping[str, tuple[Tensor, Tensor]], *, spec: jobspec.JobSpec) -> None:
    """The frozen adapter holds these (A, B), of any rank, by layer; without any there is none in the forward pass."""
    assert isinstance(spec.method, jobspec.Lora)
    # PEFT's types say too little of it.
    tuner: Any = network.base_model
    if not any(len(a) for a, _ in pairs.values()):
        tuner.set_adapter(TRAINED)
        return
    if BESIDE not in network.peft_config:
        targets = list(tuner.peft_config[TRAINED].target_modules)
        config = LoraConfig(r=1, lora_alpha=spec.method.factor, target_modules=targets)  # type: ignore[arg-type]
        # Not that of the subclass, which would copy a classifier's head for it.
        PeftModel.add_adapter(network, BESIDE, config)
    layers = _layers(network)
    for path, (a, b) in pairs.items():
        _put(layers[path].lora_A[BESIDE], "weight", a)
        _put(layers[path].lora_B[BESIDE], "weight", b)
    tuner.set_adapter([TRAINED, BESIDE])


def _set_trained(network: PeftModel, factors: Collection[Factor]) -> None:
    for layer in _layers(network).values():
        outer = layer.lora_B[TRAINED]
        layer.lora_A[TRAINED].weight.requires_grad_("lora_A" in factors)
        outer.weight.requires_grad_("lora_B" in factors)
        if isinstance(outer, WithCore):
            outer.core.requires_grad_("lora_R" in factors)
        if BESIDE in layer.lora_A:
            layer.lora_A[BESIDE].weight.requires_grad_(False)
            layer.lora_B[BESIDE].weight.requires_grad_(False)


def _layers(network: PeftModel) -> dict[str, Any]:
    """The layers with an adapter, by the name that their tensors begin with."""
    found = {path: module for path, module in network.named_modules() if isinstance(module, LoraLayer)}
    # An embedding's adapter keeps its tensors elsewhere; they travel whole.
    return {path: layer for path, layer in found.items() if TRAINED in layer.lora_A}


def _put(module: nn.Module, name: str, values: Tensor) -> None:
    """Into the parameter's own memory; into new memory where the shape is another one."""
    parameter = getattr(module, name)
    if parameter.shape == values.shape:
        parameter.copy_(values)
    else:
        # Always a copy in rows: a view would keep the whole alive, and lie in columns.
        own = torch.empty(values.shape, device=parameter.device, dtype=parameter.dtype).copy_(values)
        setattr(module, name, nn.Parameter(own))


@torch.no_grad()
def _span_base_weight(layer: Any) -> None:
    """Fixed A and B that span the base weight's leading singular directions, and R = 0 between them.

    Fed-SB (Singhal et al. 2025, arXiv:2502.15436) takes them from a first gradient of the whole weight; version 0 is
    made without any rows, so they come from the weight itself, as in LoRA-XS (Balazy et al. 2024, arXiv:2405.17604).
    They are orthonormal, so that a step of R is the projection of a step of the weight. Directions that the weight does
    not have stay zero.
    """
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    weight = weight.T if layer.fan_in_fan_out else weight
    a, b = layer.lora_A[TRAINED].weight, layer.lora_B[TRAINED].weight
    count = min(len(a) + OVERSAMPLED_DIRECTIONS, *weight.shape)
    left, _, right = torch.svd_lowrank(weight, q=count, niter=SUBSPACE_ITERATIONS)
    kept = min(len(a), count)
    a.zero_()
    b.zero_()
    a[:kept], b[:, :kept] = right.T[:kept], left[:, :kept]
    layer.lora_B[TRAINED] = WithCore(b.detach())
