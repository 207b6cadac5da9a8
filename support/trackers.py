"""Services that a run's log is sent to as well: Weights & Biases, TensorBoard.

    trackers = open_trackers(["wandb", "tensorboard"], run.folder, config, first_step=0)
    for send in trackers:
        send("train", 7, {"loss": 2.41})

What is logged appears there as `<event>/<key>`, here `train/loss`. A further service is one more
function in OPENERS.
"""

import atexit
from collections.abc import Callable
from pathlib import Path

from support import script
from support.files import file_sha256
from support.script import UserError

Send = Callable[[str, int, dict], None]  # of an event, its step and its values


def open_trackers(names: list[str], folder: Path, config: dict, first_step: int = 0) -> list[Send]:
    """For each name a function that sends what is logged.

    folder: of the run. first_step: where the run goes on; what was sent of later steps is void.
    Raises UserError where a package is not installed. Whatever a service does, from a login that is
    missing to a network that is down, the run goes on: its first failure is one warning, and it is
    told no more.
    """
    return [_careful(name, folder, config, first_step) for name in names]


def _careful(name: str, folder: Path, config: dict, first_step: int) -> Send:
    send = None
    try:
        send = OPENERS[name](folder, config, first_step)
    except ImportError:
        raise UserError(
            f"--{name}: the package is not installed; expected {name} beside the others; pip "
            f"install {name}, or drop the flag"
        ) from None
    except Exception as error:
        _warn(name, error)

    def careful_send(event: str, step: int, values: dict) -> None:
        nonlocal send
        if send is None:
            return
        try:
            send(event, step, values)
        except Exception as error:
            _warn(name, error)
            send = None

    return careful_send


def _warn(name: str, error: Exception) -> None:
    reason = script.shown(f"{type(error).__name__}: {error}")
    script.say(f"warning: nothing is sent to {name} ({reason}); training goes on")


def _open_wandb(folder: Path, config: dict, first_step: int) -> Send:
    """WANDB_MODE=offline keeps it in the run directory, for `wandb sync`."""
    import wandb

    run = wandb.init(
        project="pygpt2",
        name=folder.name,
        id=file_sha256(folder / "train.json")[:16],  # it says when the run began, and never changes
        resume="allow",
        dir=folder,
        config=config,
    )

    def send(event: str, step: int, values: dict) -> None:
        run.log({f"{event}/{key}": value for key, value in values.items()}, step=step)

    return send


def _open_tensorboard(folder: Path, config: dict, first_step: int) -> Send:
    """Files in the run directory, for `tensorboard --logdir runs`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))
    atexit.register(writer.close)

    def send(event: str, step: int, values: dict) -> None:
        for key, value in values.items():
            if isinstance(value, str):
                writer.add_text(f"{event}/{key}", value, step)
            elif value is not None:
                writer.add_scalar(f"{event}/{key}", value, step)

    return send


OPENERS = {"wandb": _open_wandb, "tensorboard": _open_tensorboard}
