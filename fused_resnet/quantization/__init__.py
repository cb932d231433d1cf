"""Eight-bit inference: ranges found by calibration or in training, kept with the blocks.

`observers.py` chooses ranges, `calibrate.py` runs the model under them, `quantize.py` changes it,
`qat.py` has it trained, `state.py` has the ranges as data. What eight bits mean is in
`layers/quantized.py` and `reference.py`, what runs them in `modules/quantized.py`,
`modules/fake_quantized.py` and `ops/residual_blocks_int8.py`.
"""

from .qat import prepare_qat
from .quantize import dequantize, quantize
from .state import load_quantization_state, quantization_state, save_quantization_state

__all__ = [
    "dequantize",
    "load_quantization_state",
    "prepare_qat",
    "quantization_state",
    "quantize",
    "save_quantization_state",
]
