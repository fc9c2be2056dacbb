"""A GGUF file in bfloat16 made of a quantised one: the same weights for every peer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write(source: Path, target: Path) -> None:
    """Dequantise matrices of `source` to bfloat16 and vectors to float32; keep all the rest."""
    reader = gguf.GGUFReader(source)
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    fields.pop("general.file_type", None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for name, field in fields.items():
        kind, *of = field.types
        writer.add_key_value(name, field.contents(), kind, of[-1] if of else None)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, bf16), raw_dtype=bf16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
