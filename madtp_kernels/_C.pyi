# SPDX-License-Identifier: Apache-2.0
"""The C++ and CUDA kernels of madtp_kernels, called with addresses (csrc/python).

A dtype is a number of madtp::DType, an activation one of madtp::Activation. An address of 0 stands for what is not
given. Arguments are taken by position: the bindings have no names for them.
"""

from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    cuda: str | None  # its version; None: CPU kernels only
    cuda_archs: list[str]
    cuda_missing: str | None  # why there is no CUDA
    cpu_isas: list[str]
    openmp: bool

def build_info() -> BuildInfo:
    """What was compiled: version, compiler, CUDA, instruction sets, OpenMP."""

_Record4 = tuple[int, int, int, int]
_Record8 = tuple[int, int, int, int, int, int, int, int]
_Record9 = tuple[int, int, int, int, int, int, int, int, int]

_Strided = tuple[int, int, int]  # address, row stride, head stride
# Fields of structs of madtp/tokens.h, in their order.
# mag_logits, dtype, stride, alignment_tokens, cu_seqlens, tokens, batch, summary_index, protected_rows
_ScoreInputs = _Record9
_TokenSelection = _Record8  # keep, cu_seqlens_in, cu_seqlens_out, source, merge_weight, tokens, capacity, batch
_SelectionOutputs = _Record4  # keep, cu_seqlens_out, source, merge_weight

class cpu:
    """A module. Kernels run on `threads` threads."""

    @staticmethod
    def isa() -> str:
        """The instruction set in use. Raises ValueError when MADTP_CPU_ISA cannot be honoured."""
    @staticmethod
    def available_isas() -> list[str]:
        """What MADTP_CPU_ISA may name here."""

    class AttentionInputs:
        """madtp::AttentionInputs: it points into tensors, which must outlive it."""

        def __init__(
            self,
            dtype: int,
            q: _Strided,
            k: _Strided,
            v: _Strided,
            cu_seqlens_q: int,
            cu_seqlens_k: int,
            tokens_q: int,
            tokens_k: int,
            batch: int,
            heads: int,
            head_dim: int,
            softmax_scale: float,
            causal: bool,
            summary_index: int,
            key_heads: int,
            window_left: int,
            window_right: int,
            softcap: float,
            alibi_slopes: int,
            alibi_stride: int,
            /,
        ) -> None: ...

    @staticmethod
    def varlen_attention(
        inputs: AttentionInputs,
        out: int,
        lse: int,
        summary_attention: int,
        received_attention: int,
        workspace: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def varlen_attention_backward(
        inputs: AttentionInputs,
        out: int,
        lse: int,
        grad_out: int,
        grad_summary_attention: int,
        grad_received_attention: int,
        grad_q: int,
        grad_k: int,
        grad_v: int,
        workspace: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def varlen_attention_workspace(inputs: AttentionInputs, statistics: bool, threads: int, /) -> int:
        """Bytes."""
    @staticmethod
    def varlen_attention_backward_workspace(inputs: AttentionInputs, statistics: bool, threads: int, /) -> int:
        """Bytes."""
    class AttentionRowsInputs:
        """madtp::AttentionRowsInputs: it points into tensors, which must outlive it."""

        def __init__(
            self,
            dtype: int,
            q_rows: _Strided,
            k: _Strided,
            cu_seqlens_q: int,
            cu_seqlens_k: int,
            rows: int,
            tokens: int,
            batch: int,
            heads: int,
            key_heads: int,
            head_dim: int,
            softmax_scale: float,
            row_position: int,
            /,
        ) -> None: ...

    @staticmethod
    def attention_rows(inputs: AttentionRowsInputs, attention: int, workspace: int, threads: int, /) -> None: ...
    @staticmethod
    def attention_rows_workspace(inputs: AttentionRowsInputs, threads: int, /) -> int:
        """Bytes."""
    @staticmethod
    def sparse24_layout_bytes(out_features: int, in_features: int, weight_dtype: int, /) -> int: ...
    @staticmethod
    def sparse24_pack(
        values: int, dtype: int, indices: int, out_features: int, in_features: int, layout: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def sparse24_prune(
        weight: int,
        dtype: int,
        weight_stride: int,
        score: int,
        score_stride: int,
        out_features: int,
        in_features: int,
        values: int,
        indices: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def sparse24_linear(
        x: int,
        dtype: int,
        x_stride: int,
        tokens: int,
        layout: int,
        weight_dtype: int,
        out_features: int,
        in_features: int,
        bias: int,
        bias_dtype: int,
        activation: int,
        scale: int,
        scale_dtype: int,
        residual: int,
        residual_stride: int,
        num_rows: int,
        out: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def quantized_layout_bytes(out_features: int, in_features: int, sparse: bool, many_rows: bool, /) -> int: ...
    @staticmethod
    def quantized_pack(
        values: int,
        indices: int,
        out_features: int,
        in_features: int,
        many_rows: bool,
        layout: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def quantized_linear(
        x: int,
        dtype: int,
        x_stride: int,
        tokens: int,
        layout: int,
        sparse: bool,
        weight_scale: int,
        out_features: int,
        in_features: int,
        bias: int,
        bias_dtype: int,
        activation: int,
        scale: int,
        scale_dtype: int,
        residual: int,
        residual_stride: int,
        num_rows: int,
        many_rows: bool,
        out: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def token_importance(
        summary_attention: int, received_attention: int, inputs: _ScoreInputs, importance: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def select_tokens(
        importance: int, inputs: _ScoreInputs, temperature: float, selection: _SelectionOutputs, threads: int, /
    ) -> None: ...
    @staticmethod
    def score_and_select(
        summary_attention: int,
        received_attention: int,
        inputs: _ScoreInputs,
        temperature: float,
        importance: int,
        selection: _SelectionOutputs,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def gather_merge(
        x: int, x_dtype: int, x_stride: int, channels: int, selection: _TokenSelection, out: int, threads: int, /
    ) -> None: ...
    @staticmethod
    def gather_merge_backward(
        grad: int,
        grad_stride: int,
        x: int,
        x_dtype: int,
        x_stride: int,
        channels: int,
        selection: _TokenSelection,
        grad_x: int,
        grad_weight: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def gather_merge_layernorm(
        x: int,
        x_dtype: int,
        x_stride: int,
        channels: int,
        selection: _TokenSelection,
        weight: int,
        bias: int,
        affine_dtype: int,
        eps: float,
        x_out: int,
        normed: int,
        mean: int,
        rstd: int,
        threads: int,
        /,
    ) -> None: ...
    @staticmethod
    def gather_merge_rmsnorm(
        x: int,
        x_dtype: int,
        x_stride: int,
        channels: int,
        selection: _TokenSelection,
        weight: int,
        affine_dtype: int,
        eps: float,
        x_out: int,
        normed: int,
        threads: int,
        /,
    ) -> None: ...

_Config = tuple[int, int, int, int]  # architecture, tile_tokens, tile_out_features, cluster

class cuda:
    """A module, where the extension was built with CUDA. Kernels run on `stream`, a cudaStream_t."""

    @staticmethod
    def sparse24_layout_bytes(out_features: int, in_features: int, weight_dtype: int, /) -> int: ...
    @staticmethod
    def sparse24_pack(
        values: int, dtype: int, indices: int, out_features: int, in_features: int, layout: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def sparse24_prune(
        weight: int,
        dtype: int,
        weight_stride: int,
        score: int,
        score_stride: int,
        out_features: int,
        in_features: int,
        transposed: bool,
        values: int,
        indices: int,
        has_nan: int,
        stream: int,
        /,
    ) -> None: ...

    class Sparse24Linear:
        """madtp::Sparse24Linear: it points into tensors, which must outlive it."""

        def __init__(
            self,
            x: int,
            dtype: int,
            x_stride: int,
            tokens: int,
            layout: int,
            weight_dtype: int,
            out_features: int,
            in_features: int,
            bias: int,
            bias_dtype: int,
            activation: int,
            scale: int,
            scale_dtype: int,
            residual: int,
            residual_stride: int,
            num_rows: int,
            /,
        ) -> None: ...

    @staticmethod
    def sparse24_linear_configs(inputs: Sparse24Linear, /) -> list[_Config]: ...
    @staticmethod
    def sparse24_linear(inputs: Sparse24Linear, out: int, stream: int, config: _Config | None, /) -> None: ...
    @staticmethod
    def quantized_layout_bytes(out_features: int, in_features: int, /) -> int: ...
    @staticmethod
    def quantized_pack(
        values: int, indices: int, out_features: int, in_features: int, layout: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def quantize_rows(
        x: int,
        dtype: int,
        x_stride: int,
        tokens: int,
        in_features: int,
        num_rows: int,
        values: int,
        type: int,
        stride: int,
        scale: int,
        stream: int,
        /,
    ) -> None: ...

    class QuantizedRowsLinear:
        """madtp::QuantizedLinear of quantised rows in place of x: it points into tensors, which must outlive it."""

        def __init__(
            self,
            values: int,
            type: int,
            stride: int,
            x_scale: int,
            dtype: int,
            tokens: int,
            layout: int,
            weight_scale: int,
            out_features: int,
            in_features: int,
            bias: int,
            bias_dtype: int,
            activation: int,
            scale: int,
            scale_dtype: int,
            residual: int,
            residual_stride: int,
            num_rows: int,
            /,
        ) -> None: ...

    @staticmethod
    def quantized_linear_configs(inputs: QuantizedRowsLinear, /) -> list[_Config]: ...
    @staticmethod
    def quantized_linear(inputs: QuantizedRowsLinear, out: int, stream: int, config: _Config | None, /) -> None: ...
    @staticmethod
    def gather_merge(
        x: int, x_dtype: int, x_stride: int, channels: int, selection: _TokenSelection, out: int, stream: int, /
    ) -> None: ...
    @staticmethod
    def gather_merge_backward(
        grad: int,
        grad_stride: int,
        x: int,
        x_dtype: int,
        x_stride: int,
        channels: int,
        selection: _TokenSelection,
        grad_x: int,
        grad_weight: int,
        stream: int,
        /,
    ) -> None: ...
    @staticmethod
    def gather_merge_layernorm(
        x: int,
        x_dtype: int,
        x_stride: int,
        channels: int,
        selection: _TokenSelection,
        weight: int,
        bias: int,
        affine_dtype: int,
        eps: float,
        x_out: int,
        normed: int,
        mean: int,
        rstd: int,
        stream: int,
        /,
    ) -> None: ...
