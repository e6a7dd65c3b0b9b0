"""The table of fusions: one item's modality tokens to one content vector.

Every fusion is made with `Sizes` and called with ``tokens[m]`` [B, T_m, W], ``present[m]`` bool [B] and `Given`.
Missing modalities are masked.
"""

from __future__ import annotations

from torch import nn

from genrec.adapters.coattention import CoAttention
from genrec.adapters.difference import DifferenceSet
from genrec.adapters.experts import DomainMaps, ModalityExperts
from genrec.adapters.plain_fusion import ConcatMlp, SumFusion, SummaryToken
from genrec.adapters.shared_specific import SharedSpecific
from genrec.adapters.soft_queries import SoftQueries

FUSIONS: dict[str, type[nn.Module]] = {
    "sum": SumFusion,
    "concat_mlp": ConcatMlp,
    "summary_token": SummaryToken,
    "coattention": CoAttention,
    "domain_maps": DomainMaps,
    "experts": ModalityExperts,
    "shared_specific": SharedSpecific,
    "soft_queries": SoftQueries,
    "difference": DifferenceSet,
}
