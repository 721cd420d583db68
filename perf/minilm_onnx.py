"""all-MiniLM-L6-v2 for ONNX Runtime: exported once, fused by its own optimizer, int8 as its manual says."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model
import numpy as np
import torch
import transformers
from recording import CACHE

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
INT8 = {
    "int8": {},
    "int8 per channel": {"per_channel": True},
    "int8 per channel, reduced range": {"per_channel": True, "reduce_range": True},
}


class _Hidden(torch.nn.Module):
    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.bert(**dict(zip(INPUTS, inputs, strict=True))).last_hidden_state  # type: ignore[no-any-return]


def make(kind: str) -> Path:
    """The file of `float32` or of one of INT8, made where it is missing."""
    file = CACHE / f"minilm {kind}.onnx"
    if file.exists():
        return file
    CACHE.mkdir(parents=True, exist_ok=True)
    if kind == "float32":
        _export(file)
    else:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # Its shape inference does not know the types behind its own fused operators: 1 is float32.
        extra = {"DefaultTensorType": 1}
        quantize_dynamic(
            make("float32"), file, weight_type=QuantType.QInt8, extra_options=extra, **INT8[kind]
        )
    return file


def _export(file: Path) -> None:
    from onnxruntime.transformers import optimizer

    bert = transformers.BertModel.from_pretrained(
        model.MINILM, attn_implementation="eager", add_pooling_layer=False
    ).eval()
    plain = CACHE / "minilm plain.onnx"
    axes = {name: {0: "n", 1: "s"} for name in (*INPUTS, "hidden")}
    with warnings.catch_warnings():
        # The exporter by tracing is deprecated; the patterns of the optimizer are made for what it writes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Hidden(bert),
            tuple(torch.ones((2, 8), dtype=torch.int64) for _ in INPUTS),
            str(plain),
            input_names=list(INPUTS),
            output_names=["hidden"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    fused = optimizer.optimize_model(
        str(plain), "bert", bert.config.num_attention_heads, bert.config.hidden_size, opt_level=0
    )
    assert fused.get_fused_operator_statistics()["Attention"] == bert.config.num_hidden_layers
    fused.save_model_to_file(str(file))


def embedder(kind: str) -> Callable[[list[dict[str, np.ndarray[Any, Any]]]], np.ndarray[Any, Any]]:
    """Padded batches -> embeddings [n, d] of unit length."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(make(kind), options, providers=["CPUExecutionProvider"])

    def embed(batches: list[dict[str, np.ndarray[Any, Any]]]) -> np.ndarray[Any, Any]:
        vectors = []
        for batch in batches:
            (hidden,) = session.run(None, batch)
            mask = batch["attention_mask"][..., None].astype(np.float32)
            vectors.append((hidden * mask).sum(1) / mask.sum(1))
        found = np.concatenate(vectors)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    return embed
