"""All that times, draws or reports: the work behind the command `fused-resnet`.

`clock.py` times calls, `compare.py` one model's candidates, `models.py` whole models, `kernels.py`
layers, `tune/` the ways to run one; `predict.py` predicts GPUs that are not here. `documents.py`
keeps results as data, `comparison.py` compares two of them, `page.py`, `page_plots.py` and
`plot.py` draw them.
"""

from .clock import PeakMemory, kept_bytes

__all__ = ["PeakMemory", "kept_bytes"]
