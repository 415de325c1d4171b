"""Command-line options that several commands share; help and defaults come from ``Settings``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from server.settings import Settings, load_settings


def flag(name: str) -> Any:
    """An option for a setting. Its own default is None: not given."""
    setting = Settings.model_fields[name]
    default = "" if setting.default in (None, False, ()) else f" Default: {setting.default}."
    names = choices(setting.annotation)
    metavar = f"[{'|'.join(names)}]" if names else None
    return typer.Option(
        f"--{name.replace('_', '-')}", help=f"{setting.description}{default}", show_default=False, metavar=metavar
    )


def choices(annotation: Any) -> list[str]:
    """The values of a Literal, also where None is allowed beside it; empty for any other type."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [name for part in get_args(annotation) for name in choices(part)]


Target = Annotated[str | None, typer.Argument(help=Settings.model_fields["target"].description, show_default=False)]
Drafter = Annotated[str | None, flag("drafter")]
DrafterDevice = Annotated[str | None, flag("drafter_device")]
Weights = Annotated[str | None, flag("weights")]
Engine = Annotated[str | None, flag("engine")]
GPULayers = Annotated[int | None, flag("gpu_layers")]
KVCache = Annotated[str | None, flag("kv_cache")]
Vram = Annotated[str | None, flag("vram")]
Threads = Annotated[int | None, flag("threads")]
Context = Annotated[int | None, flag("context")]
Rows = Annotated[int | None, flag("rows")]
TopK = Annotated[int | None, flag("top_k")]
Depth = Annotated[int | None, flag("depth")]
Lookup = Annotated[bool | None, typer.Option("--lookup/--no-lookup", help=Settings.model_fields["lookup"].description)]
Trees = Annotated[str | None, flag("trees")]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.", show_default=False)]


def settings_from(config: Path | None, **flags: Any) -> Settings:
    """Settings from the flags that were given, the environment and the file."""
    return load_settings({name: value for name, value in flags.items() if value is not None}, config)


def check_folder(file: Path | None, option: str) -> None:
    """Refuse, before anything runs, a file to write in a folder that does not exist."""
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"the folder of {file} does not exist", param_hint=option)
