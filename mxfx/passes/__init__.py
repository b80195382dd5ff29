"""All passes, one file each. Importing this package registers them."""

from mxfx.passes.annotate import Annotate, Rule
from mxfx.passes.distill import Distill
from mxfx.passes.expand_attention import ExpandAttention
from mxfx.passes.fold_constants import FoldConstants
from mxfx.passes.fuse_activation_quant import FuseActivationQuant
from mxfx.passes.fuse_hadamard_quant import FuseHadamardQuant
from mxfx.passes.fuse_norm import FuseNorm
from mxfx.passes.fuse_norm_quant import FuseNormQuant
from mxfx.passes.fuse_rope_quant import FuseRopeQuant
from mxfx.passes.gptq import Gptq
from mxfx.passes.insert_fake_quant import InsertFakeQuant
from mxfx.passes.insert_kv_cache import InsertKvCache
from mxfx.passes.lower import Lower
from mxfx.passes.multiply_in_fp8 import MultiplyInFp8
from mxfx.passes.online_rotation import OnlineRotation
from mxfx.passes.pack_weights import PackWeights
from mxfx.passes.permute_channels import PermuteChannels
from mxfx.passes.quantize_kv_cache import QuantizeKvCache
from mxfx.passes.raise_attention import RaiseAttention
from mxfx.passes.raise_norm import RaiseNorm
from mxfx.passes.raise_rope import RaiseRope
from mxfx.passes.rotate_qk import RotateQk
from mxfx.passes.rotate_residual import RotateResidual
from mxfx.passes.rotate_value import RotateValue
from mxfx.passes.rotation_search import RotationSearch
from mxfx.passes.round_weights import RoundWeights
from mxfx.passes.scale_channels import ScaleChannels
from mxfx.passes.transform_inputs import TransformInputs
from mxfx.passes.transform_kv import TransformKv
from mxfx.passes.transform_search import TransformSearch

__all__ = [
    "Annotate",
    "Distill",
    "ExpandAttention",
    "FoldConstants",
    "FuseActivationQuant",
    "FuseHadamardQuant",
    "FuseNorm",
    "FuseNormQuant",
    "FuseRopeQuant",
    "Gptq",
    "InsertFakeQuant",
    "InsertKvCache",
    "Lower",
    "MultiplyInFp8",
    "OnlineRotation",
    "PackWeights",
    "PermuteChannels",
    "QuantizeKvCache",
    "RaiseAttention",
    "RaiseNorm",
    "RaiseRope",
    "RotateQk",
    "RotateResidual",
    "RotateValue",
    "RotationSearch",
    "RoundWeights",
    "Rule",
    "ScaleChannels",
    "TransformInputs",
    "TransformKv",
    "TransformSearch",
]
