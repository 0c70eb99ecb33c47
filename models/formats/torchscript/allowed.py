"""What a TorchScript file may say: operators that compute on values in memory, and names that its pickles need.

Beyond what is run and stored here (`values.py`, `fusion.operators`), scripts contain operators that evaluation never
reaches or that fold away: random numbers of dropout, writes into fresh tensors, questions about types. They are
harmless; whether an operator can be explained is found out when it is reached.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fusion.operators import ALLOWED
from models.formats.torchscript.values import ABOUT_TENSORS, PRIMS, PYTHON
from models.scan.scripts import Vocabulary

_C: Any = torch._C

# Tensors made and filled, at random or not.
_MADE = """
    alpha_dropout bartlett_window bernoulli binomial blackman_window cauchy clone contiguous dropout
    _efficientzerotensor empty empty_permuted empty_strided exponential eye feature_alpha_dropout
    feature_dropout geometric hamming_window hann_window kaiser_window log_normal logspace multinomial
    native_dropout new_empty normal one_hot poisson rand rand_like randint randint_like randn randn_like
    random randperm range rrelu tensor tril_indices triu_indices uniform zero
""".split()
# The same values in other clothes: shapes, types, places, tracking of gradients.
_VIEWED = """
    adjoint alias as_tensor atleast_1d atleast_2d atleast_3d block_diag cartesian_prod _cast_Byte _cast_Char
    _cast_Double _cast_Float _cast_Half _cast_Int _cast_Long _cast_Short column_stack conj _conj conj_physical
    cpu cuda data detach diag diag_embed diagflat diagonal_scatter _dim_arange dsplit dstack fliplr flipud
    hsplit hstack imag inverse is_nonzero item lift_fresh matrix_H mH moveaxis mT narrow_copy
    new_empty_strided numpy_T ravel real requires_grad _reshape_alias reshape_as _reshape_from_tensor
    resolve_conj resolve_neg row_stack _shape_as_tensor squeeze_copy _stack swapaxes swapdims to_dense
    to_mkldnn unflatten_dense_tensors unsafe_chunk unsafe_split unsafe_split_with_sizes _unsafe_view
    view_as_complex view_as_real vsplit vstack
""".split()
_COMPUTED = """
    absolute _adaptive_avg_pool3d adaptive_max_pool3d _add_relu addbmm addmv addr all allclose aminmax angle
    any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argsort argwhere atan2 _batch_norm_impl_index
    bilinear binary_cross_entropy bincount cdist clip complex concatenate conv_tbc convolution _convolution
    _convolution_mode copysign corrcoef count_nonzero cov cross cross_entropy_loss cummax cummin deg2rad diff
    digamma dist divide embedding_bag embedding_renorm equal erfc erfinv _euclidean_dist exp2 expm1 fix
    float_power fmax fmin frac fractional_max_pool2d frexp frobenius_norm gcd gradient greater greater_equal
    gru gru_cell heaviside histc huber_loss hypot index_add index_copy index_fill index_reduce inner
    __interpolate isclose isfinite isin isinf isneginf isposinf istft kl_div kron kthvalue l1_loss lcm ldexp
    less less_equal lgamma log_sigmoid _log_softmax logaddexp logaddexp2 logcumsumexp logdet logit lstm_cell
    masked_scatter masked_select _masked_softmax matrix_exp matrix_power max_unpool2d max_unpool3d median mode
    modf mse_loss msort multiply nanmean nanmedian nansum native_batch_norm native_channel_shuffle
    native_group_norm native_layer_norm _native_multi_head_attention negative _nested_tensor_from_mask
    _nested_tensor_from_mask_left_aligned nextafter nll_loss nll_loss2d nll_loss_nd nonzero norm_except_dim
    not_equal nuclear_norm outer _pad_circular _pad_enum pairwise_distance pinverse polar positive quantile
    quantized_max_pool2d rad2deg renorm rnn_relu rnn_relu_cell rnn_tanh rnn_tanh_cell _safe_softmax
    scatter_add searchsorted sgn signbit sinc slogdet smooth_l1_loss _softmax std_mean stft subtract
    sum_to_size svd take take_along_dim tensordot trace _transformer_encoder_layer_fwd trapezoid trapz
    _trilinear true_divide unique_consecutive unique_dim __upsample __upsample_bilinear __upsample_nearest
    vander vdot _weight_norm xlogy
""".split()
_QUANTIZED = """
    dequantize fake_quantize_per_channel_affine fake_quantize_per_tensor_affine int_repr q_per_channel_axis
    q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme quantize_per_channel
    quantize_per_tensor quantize_per_tensor_dynamic
""".split()
# What layers become in core ATen (`ExportedProgram.run_decompositions`), beside what stands above already.
CORE = """
    _cdist_forward _embedding_bag _fft_c2c _fft_c2r _fft_r2c grid_sampler_2d grid_sampler_3d _local_scalar_dense
    max_pool3d_with_indices _native_batch_norm_legit _native_batch_norm_legit_no_training _pdist_forward _prelu_kernel
    rrelu_with_noise_functional _scaled_dot_product_attention_math _scaled_dot_product_cudnn_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable
""".split()
# Lists, words and questions.
_ASIDE = """
    _assert_async _assert_scalar _assert_tensor_metadata bin broadcast_shapes can_cast capitalize chr clear
    Complex ComplexImplicit count degrees Delete device dict divmod element_size endswith expandtabs fabs
    factorial find gamma get_autocast_dtype get_device has_torch_function hash hex __iand__ __ilshift__
    _infer_size __ior__ __irshift__ is_autocast_cpu_enabled is_coalesced is_conj is_distributed is_inference
    is_leaf is_neg is_pinned is_same_size is_signed isalnum isalpha isdecimal isdigit isidentifier islower
    isnumeric isprintable isreal isspace istitle isupper __ixor__ join ljust lower __lshift__ lstrip
    mathremainder oct ord partition popitem promote_types radians remove replace result_type rfind rindex
    rjust __round_to_zero_floordiv rpartition __rshift__ rsplit rstrip set_grad_enabled setdefault
    _size_if_not_equal sorted splitlines startswith storage_offset stride strip swapcase sym_numel sym_stride
    title _unwrap_optional update upper zfill
""".split()
# Whole families by how their names begin: linear algebra, special functions, interpolation, initial values.
_FAMILIES = ("linalg_", "special_", "fft_", "upsample_", "_upsample_", "_no_grad_")
_HARMLESS = frozenset((*_MADE, *_VIEWED, *_COMPUTED, *_QUANTIZED, *CORE, *_ASIDE))
# A twin that writes where it is told to, though the operator itself does not.
_WRITING = frozenset({"as_strided_"})
_PRIMS = """
    EnumName EnumValue ModuleContainerIndex NumToTensor RaiseException StringIndex TupleIndex
    TupleUnpack abs data device dtype grad index is_cpu is_cuda is_ipu is_maia is_meta is_mkldnn is_mps is_mtia
    is_nested is_quantized is_sparse is_sparse_csr is_vulkan is_xla is_xpu itemsize layout max min
    name nbytes rangelist requires_grad tolist type unchecked_cast unchecked_unwrap_optional
""".split()
_LAYERS = """
    add add_relu add_scalar add_scalar_relu batch_norm batch_norm1d batch_norm1d_relu batch_norm2d
    batch_norm2d_relu batch_norm3d batch_norm3d_relu cat cat_relu celu clamp conv1d conv1d_dynamic
    conv1d_prepack conv1d_relu conv1d_unpack conv2d conv2d_add conv2d_add_relu conv2d_dilation conv2d_dynamic
    conv2d_groups conv2d_output_padding conv2d_padding conv2d_prepack conv2d_relu conv2d_stride
    conv2d_transpose conv2d_unpack conv3d conv3d_dynamic conv3d_prepack conv3d_relu conv3d_unpack conv_prepack
    conv_transpose1d conv_transpose1d_prepack conv_transpose1d_unpack conv_transpose2d
    conv_transpose2d_prepack conv_transpose2d_unpack conv_transpose3d conv_transpose3d_prepack
    conv_transpose3d_unpack conv_unpack dropout elu embedding_bag_4bit_prepack embedding_bag_byte_prepack
    embedding_bag_prepack embedding_bag_unpack embedding_byte group_norm hardswish instance_norm layer_norm
    leaky_relu linear linear_dynamic linear_dynamic_fp16 linear_leaky_relu linear_prepack linear_prepack_fp16
    linear_prepack_fp16_legacy linear_prepack_legacy linear_relu linear_relu_dynamic linear_relu_dynamic_fp16
    linear_tanh linear_unpack linear_unpack_fp16 make_quantized_cell_params make_quantized_cell_params_dynamic
    make_quantized_cell_params_fp16 matmul max_pool1d max_pool2d mul mul_relu mul_scalar mul_scalar_relu prelu
    relu6 sigmoid softmax threshold
""".split()

# Operators that do more than compute, and what they do.
OUTSIDE = {
    "aten::save": "writes files",
    "aten::from_file": "reads and writes files",
    "aten::load": "reads files",
    "aten::wait": "waits for other processes",
    "prim::rpc_async": "calls other machines",
    "prim::rpc_remote": "calls other machines",
    "prim::rpc_sync": "calls other machines",
}
OUTSIDE_SPACES = {
    "c10d": "talks to other processes",
    "symm_mem": "talks to other processes",
    "debugprims": "reads files",
    "inductor": "changes memory of others",
    "profiler": "watches the process",
}

# What optimizers leave that nothing can read, by a part of the operators' names, and what to do.
_INFERENCE = (
    "torch.jit.optimize_for_inference leaves weights out of the file, so that torch cannot load it either: save the "
    "network as it was before."
)
UNREADABLE = {
    "mkldnn_prepacked::": "The weights are packed for one processor: save the network as it was before.",
    "prim::mkldnn": _INFERENCE,
    "MKLDNN": _INFERENCE,
    "prepacked::": "The weights are packed for XNNPACK by optimize_for_mobile: save the network as it was before, or "
    "as torch.jit.freeze makes it.",
    "vulkan_prepack::": "The weights are packed for a GPU by optimize_for_mobile: save the network as it was before.",
}

# The classes written in C++ that packed weights are kept in.
CLASSES = frozenset(
    f"__torch__.torch.classes.{name}"
    for name in (
        "quantized.LinearPackedParamsBase",
        "quantized.Conv2dPackedParamsBase",
        "quantized.Conv3dPackedParamsBase",
        "quantized.EmbeddingPackedParamsBase",
        "rnn.CellParamsBase",
        "xnnpack.LinearOpContext",
        "xnnpack.Conv2dOpContext",
        "xnnpack.TransposeConv2dOpContext",
        "mkldnn.ConvOpContext",
    )
)

# What torch's pickler writes (torch/csrc/jit/serialization/pickler.cpp) and `torch.save` writes of tensors.
GLOBALS = frozenset(
    {("collections", "OrderedDict"), ("builtins", "complex"), ("torch", "device"), ("torch", "Size")}
    | {
        ("torch._utils", f"_rebuild_{kind}")
        for kind in ("tensor_v2", "qtensor", "parameter", "sparse_tensor")
    }
    | {("torch.jit._pickle", f"build_{kind}") for kind in ("intlist", "tensorlist", "doublelist", "boollist")}
    | {("torch.jit._pickle", name) for name in ("restore_type_tag", "build_tensor_from_id")}
    | {
        ("torch", f"{kind}Storage")
        for kind in (
            "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble ComplexHalf QInt8 "
            "QUInt8 QInt32 QUInt4x2 QUInt2x4 Untyped"
        ).split()
    }
    | {("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage")}
    | {("torch", f"per_{kind}_affine") for kind in ("tensor", "channel")}
    | {("torch", "per_channel_affine_float_qparams"), ("torch", "strided")}
    | {
        ("torch", name)
        for name in (
            "float16 float32 float64 bfloat16 uint8 int8 int16 int32 int64 bool complex64 complex128 quint8 qint8 "
            "qint32 uint16 uint32 uint64"
        ).split()
    }
)


@cache
def vocabulary() -> Vocabulary:
    """Everything that scripts may call."""
    known = {schema.name.removeprefix("aten::") for schema in _C._jit_get_all_schemas()}
    names = {kind.removeprefix("aten::").partition(".")[0] for kind in (*PYTHON, *ABOUT_TENSORS)}
    names |= ALLOWED | _HARMLESS | {name for name in known if name.startswith(_FAMILIES)}
    names |= {f"{name}{twin}" for name in names for twin in ("_", "_copy")} - _WRITING
    operators = {f"aten::{name}" for name in names} | {f"prim::{name}" for name in _PRIMS} | set(PRIMS)
    operators |= {f"quantized::{name}" for name in _LAYERS}
    foreign = {name for name in known if "::" not in name} - names
    return Vocabulary(frozenset(operators), frozenset(foreign), CLASSES, frozenset({"unpack"}))
