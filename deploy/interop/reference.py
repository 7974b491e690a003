"""What `transformers` computes for a backbone with Concord's two bottleneck adapters: the yardstick of the interop checks.

A reference file (safetensors) holds, for one batch:

    input_ids, token_types, mask [n, t], labels [n]                     i64
    adapter.<layer>.<global|private>.<down|up>.<weight|bias>, head.<weight|bias>   f64, all exactly representable in f32
    <f32|f64>.hidden (the encoder's output) [n, t, d], .logits [n, classes], .loss [], .grad.<name of the parameter>

and, as metadata, the factors scale_global and scale_private, and the position if it is not `ffn`. In the adapted layers

    h' = h + scale_global A_global(h) + scale_private A_private(h),    A(h) = W_up GELU(W_down h + b_down) + b_up

after the feed-forward network (position `ffn`) or after the attention's output projection (`attention`), before its residual and
LayerNorm. The head reads the mean over the tokens. What the encoder gives at padding is stored but never compared: nothing reads it, and
in f32 its rounding errors can be far larger than at a real token (1e-4 for MiniLM with adapters after the attention).
"""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModel

DTYPES = {"f32": torch.float32, "f64": torch.float64}
POSITIONS = ("ffn", "attention")


def load_backbone(folder, dtype):
    """The frozen encoder of a Hugging Face folder, in `dtype`, dropout off."""
    model = AutoModel.from_pretrained(folder, dtype=dtype)
    model.requires_grad_(False)
    return model.eval()


def hooked_layers(model, position="ffn"):
    """The dense layer, one in every encoder layer, that the adapters are hooked to: the feed-forward network's second, or the attention's
    output projection."""
    if model.config.model_type == "distilbert":
        layers = model.transformer.layer
        return [layer.ffn.lin2 if position == "ffn" else layer.attention.out_lin for layer in layers]
    return [(layer.output if position == "ffn" else layer.attention.output).dense for layer in model.encoder.layer]


def bottleneck(parameters, stem, h):
    """A(h) of the adapter whose parameters start with `stem`."""
    inner = functional.linear(h, parameters[f"{stem}.down.weight"], parameters[f"{stem}.down.bias"])
    return functional.linear(functional.gelu(inner), parameters[f"{stem}.up.weight"], parameters[f"{stem}.up.bias"])


def hook_adapters(model, parameters, layers, scale_global, scale_private, position="ffn"):
    """Puts both adapters into the given layers; returns the handles that take them out again."""
    places = hooked_layers(model, position)

    def hook_of(layer):
        def hook(_module, _inputs, h):
            shared = bottleneck(parameters, f"adapter.{layer}.global", h)
            private = bottleneck(parameters, f"adapter.{layer}.private", h)
            return h + scale_global * shared + scale_private * private

        return hook

    return [places[layer].register_forward_hook(hook_of(layer)) for layer in layers]


def mean_pool(hidden, mask):
    """Mean over the real tokens of each row."""
    weight = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weight).sum(1) / weight.sum(1)


def forward(model, batch):
    """The encoder's output for a batch of ids, types and mask."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["mask"]}
    if model.config.model_type == "bert":
        inputs["token_type_ids"] = batch["token_types"]
    return model(**inputs).last_hidden_state


def random_parameters(generator, model, layers, ranks, classes, up_std):
    """Adapters of bottlenecks `ranks` (global, private) in the given layers, and a head; f64 values that f32 holds exactly.

    `up_std`: spread of the up-projections. The gradients, and with them the rounding errors of f32, grow with it.
    """
    width = model.config.hidden_size

    def draw(*shape, std):
        return (torch.randn(*shape, generator=generator) * std).double()

    parameters = {}
    for layer in layers:
        for name, rank in zip(("global", "private"), ranks):
            stem = f"adapter.{layer}.{name}"
            parameters[f"{stem}.down.weight"] = draw(rank, width, std=width**-0.5)
            parameters[f"{stem}.down.bias"] = draw(rank, std=0.1)
            parameters[f"{stem}.up.weight"] = draw(width, rank, std=up_std)
            parameters[f"{stem}.up.bias"] = draw(width, std=0.1)
    parameters["head.weight"] = draw(classes, width, std=width**-0.5)
    parameters["head.bias"] = draw(classes, std=0.1)
    return parameters


def adapted_layers(parameters):
    """The layers that have adapters, from the parameters' names."""
    return sorted({int(name.split(".")[1]) for name in parameters if name.startswith("adapter.")})


def compute(folder, batch, parameters, scale_global, scale_private, position="ffn"):
    """All results of a reference file, in both precisions."""
    results = {}
    for name, dtype in DTYPES.items():
        model = load_backbone(folder, dtype)
        leaves = {key: value.to(dtype).requires_grad_() for key, value in parameters.items()}
        hook_adapters(model, leaves, adapted_layers(parameters), scale_global, scale_private, position)
        hidden = forward(model, batch)
        logits = functional.linear(mean_pool(hidden, batch["mask"]), leaves["head.weight"], leaves["head.bias"])
        loss = functional.cross_entropy(logits, batch["labels"])
        loss.backward()
        results[f"{name}.hidden"] = hidden.detach()
        results[f"{name}.logits"] = logits.detach()
        results[f"{name}.loss"] = loss.detach()
        for key, leaf in leaves.items():
            results[f"{name}.grad.{key}"] = leaf.grad
    return results


def write(path, batch, parameters, results, scale_global, scale_private, position="ffn"):
    """Stores a reference file."""
    tensors = {**batch, **parameters, **results}
    metadata = {"scale_global": repr(scale_global), "scale_private": repr(scale_private)}
    if position != "ffn":
        metadata["position"] = position
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def read(path):
    """A reference file as (batch, parameters, results, scale_global, scale_private, position)."""
    batch, parameters, results = {}, {}, {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():
            home = results if name[:4] in ("f32.", "f64.") else parameters if "." in name else batch
            home[name] = file.get_tensor(name)
    scales = float(metadata["scale_global"]), float(metadata["scale_private"])
    return batch, parameters, results, *scales, metadata.get("position", "ffn")


def largest_difference(found, expected, mask):
    """The largest absolute difference between two sets of results, by precision; a name in only one of them is an error."""
    if found.keys() != expected.keys():
        raise SystemExit(f"results differ in their names: {sorted(found.keys() ^ expected.keys())}")
    worst = {}
    for name, value in expected.items():
        difference = (found[name].double() - value.double()).abs()
        if name.endswith(".hidden"):
            difference = difference * mask.unsqueeze(-1)
        worst[name[:3]] = max(worst.get(name[:3], 0.0), difference.max().item())
    return worst


def compact_json(path, value):
    """Writes JSON without white space."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, separators=(",", ":"))
        file.write("\n")
