"""The backends and the choice between them.

A backend is an instance of a class derived from `Backend`, which says what it may do; `registry.py`
chooses one by a tensor's device and by what the user asked for. A package of yours registers its
own: `backends.register(MyBackend())`.
"""

from . import cpu, cuda, self_check, triton
from .backend import Backend
from .recording import Plan, Recorder, only_recorded
from .reference import Reference
from .registry import (
    as_chosen,
    available,
    check_environment,
    choose,
    chosen,
    cpu_isa,
    explain,
    has_kernel,
    hold_blocks_in_graphs,
    in_graphs,
    named,
    register,
    release,
    use_backend,
)

__all__ = [
    "Backend",
    "Plan",
    "Recorder",
    "as_chosen",
    "available",
    "check_environment",
    "choose",
    "chosen",
    "cpu",
    "cpu_isa",
    "cuda",
    "explain",
    "has_kernel",
    "hold_blocks_in_graphs",
    "in_graphs",
    "named",
    "only_recorded",
    "register",
    "release",
    "self_check",
    "triton",
    "use_backend",
]

for _backend in (Reference(), cpu.Cpu(), triton.Triton(), cuda.Cuda()):
    register(_backend)
