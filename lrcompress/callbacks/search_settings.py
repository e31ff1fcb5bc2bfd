"""Arguments of ``keep="auto"``, checked."""

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lrcompress.budget import allocate
from lrcompress.callbacks.search import BETTER, KeepSearch
from lrcompress.distributed import Processes
from lrcompress.engine.candidates import candidates
from lrcompress.engine.settings import Settings
from lrcompress.errors import PlatformError, SettingError, nearest_hint, share_hint
from lrcompress.keep_search import Drop, better_direction, check_leaves_some, check_monitor
from lrcompress.schedules import Point, parse_points

AUTO = "auto"
MAX_TRIALS = 7  # find any hundredth of keep


def search_of(
    keep: object,
    settings: Settings,
    drop: float | str | None,
    monitor: str | None,
    monitor_mode: str | None,
    max_trials: int,
    trial_share: float,
    *,
    verbose: bool,
) -> KeepSearch | None:
    """Return the search of a callback with these arguments; None where ``keep`` is given.

    Raises:
        SettingError: if one is missing, without use or not what it may be, or the settings do
            not allow sizes to be tried.
    """
    given = {"drop": drop, "monitor": monitor, "monitor_mode": monitor_mode}
    if keep != AUTO:
        without_use = [name for name, value in given.items() if value is not None]
        without_use += ["max_trials"] if max_trials != MAX_TRIALS else []
        without_use += ["trial_share"] if trial_share != 1 else []
        if without_use:
            raise SettingError(
                f"{without_use[0]}= is what keep='auto' is chosen by, got keep={keep!r}; give "
                f"keep='auto', or leave {' and '.join(without_use)} out"
            )
        return None
    missing = [n for n, x in (("drop", drop), ("monitor", monitor)) if x is None]
    if missing or not isinstance(monitor, str):
        raise SettingError(
            "keep='auto' is the least that loses no more than drop= of the metric monitor=, "
            "such as drop=0.01, monitor='val_accuracy'; "
            + (f"{' and '.join(missing)} missing" if missing else f"got monitor={monitor!r}")
        )
    if not isinstance(max_trials, int) or isinstance(max_trials, bool) or max_trials < 1:
        raise SettingError(f"max_trials must be a whole number from 1, got {max_trials!r}")
    if isinstance(trial_share, bool) or not 0 < trial_share <= 1:
        raise SettingError(
            "trial_share is the share of the validation data for the first trials, above 0 and up "
            f"to 1, got {trial_share!r}"
        )
    _check_settings(settings)
    parsed, mode = Drop.parse(drop), check_monitor(monitor, monitor_mode)
    check_leaves_some(parsed, monitor, mode)
    search = KeepSearch(
        parsed,
        monitor,
        mode,
        max_trials,
        trial_share,
        verbose,
    )
    guess = better_direction(monitor)
    if monitor_mode is not None and guess not in (None, monitor_mode):
        rank_zero_warn(
            f"monitor_mode={monitor_mode!r} takes {BETTER[monitor_mode]} values of {monitor!r}"
            f" for better; by its name {BETTER[guess or '']} ones are"
        )
    return search


def _check_settings(settings: Settings) -> None:
    reason = ""
    if settings.method == "kronecker":
        reason = (
            "tries many sizes of one solve, and method='kronecker' would solve anew for each; use "
            "a method of low-rank factors"
        )
    elif settings.keep_measured:
        reason = "tries sizes without measuring speed; leave keep_measured out"
    elif settings.refit is not None:
        reason = "tries sizes as they are solved, and refit= would change them after; leave it out"
    elif settings.shared:
        reason = (
            "may go back to the dense model, and shared=True has untied its weights by then; leave "
            "shared out"
        )
    if reason:
        raise SettingError(f"keep='auto' {reason}, or give keep as a number")


def points_and_keeps(
    at: float | str | list[float | str], keep: object, latency: object = None
) -> tuple[list[Point], list[float | None]]:
    """Return the points and the keep of each, None where it is searched for.

    Raises:
        SettingError: as of :func:`~lrcompress.schedules.parse_points`, and if ``keep`` is a word
            other than ``"auto"``, or ``latency`` is given beside that or for several points.
    """
    several = isinstance(at, list) and len(at) > 1
    if latency is not None and (keep == AUTO or several):
        other = f"at={at!r}" if several else "keep='auto'"
        raise SettingError(
            f"latency is the time of the model after one point / before it; got {other}: give one "
            "point, and keep as a number if at all"
        )
    if keep == AUTO:
        return parse_points(at, [None for _ in at] if isinstance(at, list) else None)
    if isinstance(keep, str):
        raise SettingError(
            "keep is a share such as 0.3, a list of them, or 'auto'; got "
            f"{keep!r}{share_hint(keep) or nearest_hint(keep, [AUTO])}"
        )
    return parse_points(at, keep)  # type: ignore[arg-type]


def check_free(module: nn.Module, settings: Settings) -> None:
    """Check before training that there are layers whose ranks can be chosen.

    Raises:
        SettingError: if all have a rank or a keep of their own, or one that they cannot have.
        NoMatchError: if a pattern of ``ranks`` or ``keeps`` matches no targeted layer.
    """
    asked = candidates(module, settings.select(module).names, settings, {})
    if all(one.rank is not None or one.keep is not None for one in asked):
        raise SettingError(
            "keep='auto' has nothing to choose: every targeted layer has a rank or a keep of its "
            "own, by ranks= or keeps="
        )
    allocate(asked, 1.0, "uniform", settings.align)


def check_platform(processes: Processes, others: Sequence[object]) -> None:
    """Check that layers can be put in and taken out again.

    Args:
        processes: of the run.
        others: callbacks that change the same model.

    Raises:
        PlatformError: under FSDP2, and with other such callbacks.
    """
    if others:
        raise PlatformError(
            "keep='auto' may go back to a state of before, which would undo what "
            f"{type(others[0]).__name__} has done since; leave one of them out, or give keep "
            "as a number"
        )
    if processes.sharded:
        raise PlatformError(
            "keep='auto' puts factors in place of layers and takes them out again, of which "
            "each process has only a part under FSDP2; give keep as a number, or use "
            "strategy='ddp'"
        )
