"""How models of known families are cut that have no plan of their own: by the class of a module, what its parts are.

torch's layers, and of transformers those without a table there: GPT-2, BERT and what is built like it, T5, OPT.
"""

from __future__ import annotations

Parts = dict[str, str]
_SELF_ATTENTION = {"query": "colwise", "key": "colwise", "value": "colwise", "num_attention_heads": "divide"}
_T5_ATTENTION = {
    "q": "colwise",
    "k": "colwise",
    "v": "colwise",
    "o": "rowwise",
    "relative_attention_bias": "embedding_heads",
    "n_heads": "divide",
}

TORCH: dict[str, Parts] = {
    "MultiheadAttention": {"": "attention"},
    "TransformerEncoderLayer": {"linear1": "colwise", "linear2": "rowwise"},
    "TransformerDecoderLayer": {"linear1": "colwise", "linear2": "rowwise"},
}
"""Modules of torch.nn."""
TRANSFORMERS: dict[str, Parts] = {
    "GPT2Attention": {
        "c_attn": "packed_colwise:0",
        "q_attn": "colwise",
        "c_proj": "rowwise",
        "num_heads": "divide",
        "split_size": "divide",
    },
    "GPT2MLP": {"c_fc": "colwise", "c_proj": "rowwise"},
    "GPT2Model": {"wte": "embedding_rowwise"},
    "BertSelfAttention": _SELF_ATTENTION,
    "BertCrossAttention": _SELF_ATTENTION,
    "BertAttention": {"output.dense": "rowwise"},
    "BertLayer": {"intermediate.dense": "colwise", "output.dense": "rowwise"},
    "T5Attention": _T5_ATTENTION,
    "T5DenseActDense": {"wi": "colwise", "wo": "rowwise"},
    "T5DenseGatedActDense": {"wi_0": "colwise", "wi_1": "colwise", "wo": "rowwise"},
    "OPTAttention": {
        "q_proj": "colwise",
        "k_proj": "colwise",
        "v_proj": "colwise",
        "out_proj": "rowwise",
        "num_heads": "divide",
    },
    "OPTDecoderLayer": {"fc1": "colwise", "fc2": "rowwise"},
}
"""Modules of transformers."""


def parts_of(module: object) -> Parts:
    """Return how a module of a known family is cut, by the names of its parts; empty for any other."""
    kind = type(module)
    for package, table in (("torch.nn.", TORCH), ("transformers.models.", TRANSFORMERS)):
        if kind.__module__.startswith(package):
            return table.get(kind.__name__, {})
    return {}
