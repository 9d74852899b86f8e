# SPDX-License-Identifier: Apache-2.0
"""Folders as compressed-tensors 0.12 wrote them, made here element by element from the description of the format."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

import madtp
from madtp import hwp

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
FP8 = torch.float8_e4m3fn


def bitmask_of(kept):
    """(N, C) bool -> (N, ceil(C/8)) uint8, the first column in the lowest bit."""
    rows = [
        [sum(bit << k for k, bit in enumerate(row[start : start + 8])) for start in range(0, len(row), 8)]
        for row in kept.int().tolist()
    ]
    return torch.tensor(rows, dtype=torch.uint8)


def picked(weight, kept):
    """The kept values in the order of rows."""
    flat = [index for index, bit in enumerate(kept.flatten().tolist()) if bit]
    return weight.view(torch.uint8 if weight.dtype == FP8 else weight.dtype).flatten()[flat].view(weight.dtype)


def stored(name, weight, kept, sparsity):
    parts = {f"{name}.bitmask": bitmask_of(kept)}
    if sparsity == "sparse-24-bitmask":
        parts[f"{name}.shape"] = torch.tensor([[size] for size in weight.shape])
        parts[f"{name}.compressed"] = picked(weight, kept).reshape(len(weight), -1)
    else:
        parts[f"{name}.shape"] = torch.tensor(weight.shape)
        parts[f"{name}.compressed"] = picked(weight, kept)
        parts[f"{name}.row_offsets"] = torch.tensor([int(kept[:row].sum()) for row in range(len(kept))])
    return parts


def write(
    folder, sparsity="sparse-24-bitmask", rounded=None, change=None, first_names=False, field="quantization_config"
):
    """A folder of a Llama whose Linears are 2:4, and the dense weights that it stands for."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**SHAPE))
    tensors, expected = {}, {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in hwp.select_modules(model, "2:4").selected:
        weight = expected[f"{name}.weight"]
        kept = torch.zeros_like(weight, dtype=torch.bool)
        for group in range(0, weight.shape[1], 4):  # another pair of positions in each group
            kept[:, group + group // 4 % 3] = kept[:, group + 3] = True
        weight = weight * kept
        if rounded is not None:
            largest = 127.5 if rounded == torch.int8 else 448
            scale = (weight.abs().amax(1, keepdim=True) / largest).bfloat16()
            weight = weight / scale.float()
            weight = (weight.round().clamp(-128, 127) if rounded == torch.int8 else weight.clamp(-448, 448)).to(rounded)
            tensors[f"{name}.weight_scale"] = scale
            tensors[f"{name}.input_scale"] = torch.ones(1)
            expected[f"{name}.weight"] = weight.float() * scale.float()
        else:
            expected[f"{name}.weight"] = weight
        prefix = f"{name}.weight" if first_names else name
        tensors |= {f"{name}.weight": weight} if sparsity == "dense" else stored(prefix, weight, kept, sparsity)
        tensors[f"{name}.weight"] = None if sparsity != "dense" else weight
    tensors = {**expected, **tensors}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    formats = {None: "dense", torch.int8: "int-quantized", FP8: "float-quantized"}
    structure = {"format": sparsity, "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    config[field] = {
        "quant_method": "compressed-tensors",
        "format": formats[rounded],
        "kv_cache_scheme": None,
        "sparsity_config": structure,
    }
    if change is not None:
        change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return expected


@pytest.mark.parametrize("rounded", [None, torch.int8, FP8])
@pytest.mark.parametrize("sparsity", ["sparse-24-bitmask", "sparse-bitmask", "dense"])
def test_dense_weights(sparsity, rounded, tmp_path):
    expected = write(tmp_path, sparsity, rounded)
    model = madtp.load_compressed_tensors(tmp_path)
    state = model.state_dict()
    assert state.keys() == expected.keys() and not model.training
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert not hasattr(model.config, "quantization_config")


def test_2_4_layers_of_the_same_numbers(tmp_path):
    expected = write(tmp_path)
    model = madtp.load_compressed_tensors(tmp_path)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = model(tokens).logits
        packed = hwp.pack(model)
        assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    assert len(packed) == 15  # seven of each layer, and the head
    for name in packed:
        assert torch.equal(model.get_submodule(name).packed_weight.to_dense(), expected[f"{name}.weight"])


@pytest.mark.parametrize("rounded, dtype", [(torch.int8, "int8"), (FP8, "fp8")])
def test_rounded_layers_have_the_numbers_of_the_file(rounded, dtype, tmp_path):
    expected = write(tmp_path, rounded=rounded)
    for model_dtype in (torch.float32, torch.bfloat16):
        model = madtp.load_compressed_tensors(tmp_path, dtype=model_dtype)
        for name in hwp.pack(model, dtype=dtype):
            found = model.get_submodule(name).packed_weight
            assert found.scheme == f"{dtype}_24"
            scale = found.scale[:, None]
            numbers = (expected[f"{name}.weight"] / scale).to(rounded).float().clamp(-127 if dtype == "int8" else -448)
            assert torch.equal(found.to_dense() / scale, numbers)


def test_the_other_loader_names_this_one(tmp_path):
    write(tmp_path)
    with pytest.raises(madtp.ModelError, match="is of compressed-tensors: load it with madtp.load_compressed_tensors"):
        madtp.from_pretrained(tmp_path)


def test_names_of_the_first_versions(tmp_path):
    expected = write(tmp_path, "sparse-bitmask", first_names=True, field="compression_config")
    state = madtp.load_compressed_tensors(tmp_path, dtype="bfloat16").state_dict()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in expected.items())


def test_shards(tmp_path):
    def split(config, tensors):
        first = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".bitmask", "lm_head.weight"))}
        save_file(first, tmp_path / "other.safetensors")
        where = dict.fromkeys(first, "other.safetensors") | dict.fromkeys(tensors, "model.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    expected = write(tmp_path, change=split)
    state = madtp.load_compressed_tensors(tmp_path).state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


NAME = "model.layers.1.mlp.up_proj"


def put(part, value):
    def change(config, tensors):
        found = tensors[f"{NAME}.{part}"]
        tensors[f"{NAME}.{part}"] = value(found) if callable(value) else value

    return change


def bit(value):
    def change(found):
        found[2, 1] = value
        return found

    return change


def without(part):
    return lambda config, tensors: tensors.pop(f"{NAME}.{part}")


def say(field, value):
    return lambda config, tensors: config["quantization_config"].update({field: value})


def sized(config, tensors):
    config["intermediate_size"] = 1 << 22


REFUSED = [
    (None, put("shape", torch.tensor([64, 1 << 40])), r"up_proj.bitmask must be uint8 \(N, ceil\(C/8\)\) of the shape"),
    (None, put("shape", torch.tensor([-64, 32])), "up_proj.bitmask must be uint8"),
    (None, put("shape", torch.tensor([64, 32, 1])), "up_proj.shape must be two integers"),
    (None, put("bitmask", bit(0b0011_0111)), "exactly 2 bits in every 4, got another number at row 2, group 2"),
    (None, put("bitmask", lambda found: found[:-1]), "up_proj.bitmask must be uint8"),
    (None, put("compressed", lambda found: found[:, 1:]), r"up_proj.compressed must be \(N, C/2\)"),
    (None, put("compressed", lambda found: found.long()), "up_proj.compressed must be of floating point"),
    (None, without("bitmask"), "up_proj must be saved as compressed, bitmask, shape, got no bitmask"),
    (None, without("compressed"), "got no compressed"),
    (None, without("shape"), "got no shape"),
    (FP8, without("weight_scale"), "up_proj.weight_scale must be there"),
    (FP8, put("weight_scale", torch.ones(3, 1)), "one for all or for each of 64 rows"),
    (FP8, put("weight_scale", torch.full((64, 1), float("nan"))), "up_proj.weight_scale must be positive and finite"),
    (FP8, put("compressed", lambda found: found.view(torch.uint8).fill_(0x7F).view(FP8)), "without NaN"),
    (None, say("format", "marlin-24"), "format must be one of dense, int-quantized"),
    (None, say("sparsity_config", {"format": "../evil.py"}), "format of sparsity_config must be one of"),
    (None, say("sparsity_config", None), "sparse-bitmask, as .* is saved, got dense"),
    (None, say("quant_method", "gptq"), "config.json must be with a quantization_config of compressed-tensors"),
    (None, sized, "cannot be read"),
]


@pytest.mark.parametrize("rounded, change, message", REFUSED)
def test_refuses(rounded, change, message, tmp_path):
    write(tmp_path, rounded=rounded, change=change)
    with pytest.raises(madtp.ModelError, match=message) as raised:
        madtp.load_compressed_tensors(tmp_path)
    assert "\n" not in str(raised.value)


def test_refuses_other_bitmasks(tmp_path):
    write(tmp_path, "sparse-bitmask", change=put("row_offsets", lambda found: found + 1))
    with pytest.raises(madtp.ModelError, match="up_proj.row_offsets must be where the rows of the bitmask begin"):
        madtp.load_compressed_tensors(tmp_path)
    write(tmp_path, "sparse-bitmask", change=put("compressed", lambda found: found[1:]))
    with pytest.raises(madtp.ModelError, match="as many as the bitmask has bits"):
        madtp.load_compressed_tensors(tmp_path)


def test_refuses_files_elsewhere(tmp_path):
    write(tmp_path)
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(madtp.ModelError, match="files of safetensors in the same folder"):
        madtp.load_compressed_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(madtp.ModelError, match="no whole file of safetensors"):
        madtp.load_compressed_tensors(tmp_path)
