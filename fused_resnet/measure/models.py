"""Times whole models: `compare.compare` over several cases, with every engine there is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .case import Candidate, Case, Engine, Result
from .compare import compare
from .engines import engines_for, settle_for
from .errors import InvalidArgumentError, first_line


def measure(
    cases: Sequence[Case],
    *,
    without: Collection[str] = (),
    engines: dict[str, Engine] | None = None,
    progress: Callable[[Case, str, float], None] = lambda case, stage, done: None,
) -> list[Result]:
    """Measures cases one after another; Ctrl-C keeps those that have one full round.

    A case in which eager itself fails, for want of memory say, is a result whose candidates are
    all skipped for that reason.

    Args:
        cases: what to measure.
        without: engines to leave out; see `engines.engines_for`.
        engines: in place of those of the cases' device.
        progress: told the case, what is done of it now, and how many cases are done, fractions
            included.

    Raises:
        InvalidArgumentError: a case cannot be run at all.
        KeyboardInterrupt: before anything was measured.
    """
    for case in cases:
        case.check()
    results: list[Result] = []
    for index, case in enumerate(cases):
        chosen = engines or engines_for(
            case.torch_device.type, case.train, without, case.quantize is not None
        )

        def tell(stage: str, done: int, total: int, case: Case = case, at: int = index) -> None:
            progress(case, stage, at + done / total)

        try:
            result = compare(
                case, chosen, settle=settle_for(chosen), required=("eager",), progress=tell
            )
        except KeyboardInterrupt:
            if not results:
                raise
            break
        except InvalidArgumentError:
            raise
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one
            reason = f"{type(error).__name__}: {first_line(error)}"
            rows = tuple(Candidate(name, skipped=reason) for name in chosen)
            result = Result(case, case.threads or 0, rows, (), False, {})
        results.append(result)
        if result.interrupted:
            break
    return results
