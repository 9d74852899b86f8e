# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse import _semi_structured_conversions as conversions

from madtp_kernels import nm_mask, sparse24_compress
from madtp_kernels.sparse24.formats import (
    from_bitmask,
    from_torch_semi_structured,
    to_bitmask,
    to_torch_semi_structured,
)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")


def masked(rows=64, columns=128, dtype=torch.float16, n=2, m=4):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(dtype)
    return weight.masked_fill(~nm_mask(weight, n, m), 0)


@pytest.mark.parametrize("dtype, n, m", [(torch.float16, 2, 4), (torch.bfloat16, 1, 4), (torch.float32, 1, 2)])
def test_torch_semi_structured(dtype, n, m):
    weight = masked(dtype=dtype, n=n, m=m)
    tensor = to_torch_semi_structured(sparse24_compress(weight))
    assert isinstance(tensor, SparseSemiStructuredTensorCUTLASS) and tensor.shape == (64, 128)
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(tensor.packed, packed) and torch.equal(tensor.meta, meta)
    back = from_torch_semi_structured(tensor)
    assert torch.equal(back.to_dense(), weight) and torch.equal(back.indices, sparse24_compress(weight).indices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_multiplies_what_we_convert(dtype):
    weight = masked(dtype=dtype).cuda()
    x = torch.randn(128, 64, dtype=dtype, device="cuda")
    tensor = to_torch_semi_structured(sparse24_compress(weight))
    torch.testing.assert_close(torch.mm(tensor, x), weight @ x, rtol=2e-2, atol=2e-2)
    made = SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    assert torch.equal(from_torch_semi_structured(made).to_dense(), weight)


def test_torch_semi_structured_refuses():
    for weight, message in (
        (masked(64, 32), r"weight must be \(N, C\) with N a multiple of 32 and C of 64 for torch, got Sparse24Weight"),
        (masked(16, 64), "N a multiple of 32"),
        (masked(dtype=torch.float64), "weight must be float32, bfloat16 or float16 for torch"),
        (masked(dtype=torch.float32), "weight must be 1:2 in float32 for torch"),
    ):
        with pytest.raises(ValueError, match=message):
            to_torch_semi_structured(sparse24_compress(weight))
    opaque = SparseSemiStructuredTensorCUSPARSELT(torch.Size((64, 64)), torch.ones(10), None, None, None, None)
    with pytest.raises(ValueError, match="got a SparseSemiStructuredTensorCUSPARSELT of torch.float32"):
        from_torch_semi_structured(opaque)
    with pytest.raises(ValueError, match="tensor must be a floating-point SparseSemiStructuredTensorCUTLASS"):
        from_torch_semi_structured(torch.ones(32, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitmask(dtype):
    weight = masked(16, 32, dtype=dtype, n=1)
    stored = to_bitmask(sparse24_compress(weight))
    for column in range(32):
        bit = (stored["bitmask"][:, column // 8] >> (column % 8)) & 1
        assert (bit | (weight[:, column] == 0)).all()  # what is not zero is kept
    back = from_bitmask(**stored)
    assert torch.equal(back.to_dense(), weight) and torch.equal(back.indices, sparse24_compress(weight).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_reads_and_writes_the_bitmask(dtype):
    theirs = pytest.importorskip("compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask")
    weight = masked(16, 32, dtype=dtype, n=1)
    ours = theirs.Sparse24BitMaskTensor.from_compressed_data(**to_bitmask(sparse24_compress(weight)))
    assert torch.equal(ours.decompress(), weight)
    made = theirs.Sparse24BitMaskTensor.from_dense(weight).dict("layer.weight")
    parts = {name.removeprefix("layer."): tensor for name, tensor in made.items()}
    assert torch.equal(from_bitmask(**parts).to_dense(), weight)


def test_bitmask_refuses():
    stored = to_bitmask(sparse24_compress(masked(16, 32)))
    with pytest.raises(ValueError, match=r"shape must be \[16, 32\] like compressed"):
        from_bitmask(**stored | {"shape": torch.tensor([16, 64])})
    with pytest.raises(ValueError, match=r"bitmask must be \(N, C/8\) = \(16, 4\)"):
        from_bitmask(**stored | {"bitmask": stored["bitmask"][:, :3]})
    stored["bitmask"][2, 1] = 0b0011_0111
    with pytest.raises(ValueError, match="bitmask must be of exactly 2 bits in every 4, got .* at row 2, group 2"):
        from_bitmask(**stored)
