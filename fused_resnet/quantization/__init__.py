"""Eight-bit inference: ranges found by calibration, kept with the blocks, saved by themselves.

`observers.py` chooses ranges, `calibrate.py` runs the model under them, `quantize.py` changes it,
`state.py` has the ranges as data. What eight bits mean is in `layers/quantized.py` and
`reference.py`, what runs them in `modules/quantized.py` and `ops/residual_blocks_int8.py`.
"""

from .quantize import dequantize, quantize
from .state import load_quantization_state, quantization_state, save_quantization_state

__all__ = [
    "dequantize",
    "load_quantization_state",
    "quantization_state",
    "quantize",
    "save_quantization_state",
]
