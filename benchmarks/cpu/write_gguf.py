"""Write the demo model as a GGUF file of another type, for llama.cpp as a peer of `rolora bench`.

    python benchmarks/cpu/write_gguf.py --type Q8_0 --output artifacts/smollm2-135m.Q8_0.gguf

Every tensor is taken to float32 and, where the source has it quantized, rounded again by the `gguf`
package. The embedding, which is the head too, keeps 8 bits as in the source: llama.cpp's own files
of 4 bits have it so for this width. The weights come from a 4-bit file, as all of the demo's do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

from deploy.gguf_files import find_demo_file

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}
"""Of llama.cpp's `llama_ftype`."""
EMBEDDING = "token_embd.weight"
ARCHITECTURE = "general.architecture"


def write(source: Path, output: Path, name: str) -> None:
    """Convert a file."""
    reader = GGUFReader(source)
    writer = GGUFWriter(output, str(reader.fields[ARCHITECTURE].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in (ARCHITECTURE, "general.file_type"):
            continue
        of_items = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], of_items)
    writer.add_file_type(FILE_TYPES[name])
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        kind = GGMLQuantizationType[name]
        if tensor.tensor_type == GGMLQuantizationType.F32:
            kind = GGMLQuantizationType.F32
        elif tensor.name == EMBEDDING:
            kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(tensor.name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Read the options and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--type", choices=sorted(FILE_TYPES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write(find_demo_file(), arguments.output, arguments.type)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
