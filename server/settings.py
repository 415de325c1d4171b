"""What a server or a command runs with: flag, else ``DOVETAIL_*`` environment, else a TOML file, else default."""

from __future__ import annotations

import difflib
import logging
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

logger = logging.getLogger(__name__)

PREFIX = "DOVETAIL_"
OTHER_VARIABLES = {"TEST_DATA", "REQUIRE_NATIVE"}  # read by the tests and by the build
BUNDLED = "dovetail"
COMMAND_LINE = "command line"
NO_VISION = "none"
NATIVE, LLAMA_CPP = "native", "llama.cpp"
LOADING_THREAD = "dovetail-load"  # the server loads in it; the command line looks for it when it ends
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class SettingsError(ValueError):
    """A flag, an environment variable or a key of the configuration file is wrong; the message names it."""


def parse_bytes(value: Any) -> Any:
    """``3GiB`` to a number of bytes; whatever is not a string passes through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2] not in UNITS:
        raise ValueError(
            f"{value!r} is no amount of memory; write a number and one of {', '.join(filter(None, UNITS))}"
        )
    return int(float(match[1]) * UNITS[match[2]])


def parse_list(value: Any) -> Any:
    """A comma-separated string, as environment variables hold lists, to its parts."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def parse_keys(value: Any) -> Any:
    """As ``parse_list``; where a key was meant and none is there, the server must not be open to all."""
    keys = parse_list(value)
    if isinstance(value, str) and not keys:
        raise ValueError("the key is empty; name one, or leave it out")
    return keys


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(parse_list)]
Keys = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(parse_keys)]


class Settings(BaseSettings):
    """Frozen. A field's description is its help on the command line.

    target None is the default model; weights None is what a packed folder holds, else fp32; drafter None is the drafter
    that lies here for the target, ``none`` switches drafting off; threads None is every core this process may use;
    context None is what the target allows; rows, top_k and depth None are those that suit the weights.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False
    )

    target: str | None = Field(
        None,
        min_length=1,
        description="Folder of safetensors, .gguf file or hub id, or 'tiny'; nothing: SmolLM2-135M-Instruct.",
    )
    drafter: str | None = Field(
        None,
        min_length=1,
        description="Folder or hub id of a drafter, or a small language model (.gguf files too), or 'none'.",
    )
    lookup: bool = Field(True, description="Draft what followed the same words before, beside the drafter.")
    trees: Literal["cost", "fixed"] = Field(
        "cost", description="Rows of a verify pass: as many as pay ('cost'), or always all of --rows ('fixed')."
    )
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = Field(
        None, description="How the target's weights are held; nothing: as a packed folder was made, else fp32."
    )
    engine: Literal["native", "llama.cpp"] | None = Field(
        None, description="What computes the target; nothing: llama.cpp for .gguf files beyond the native layers."
    )
    gpu_layers: int = Field(0, ge=0, description="Layers that llama.cpp computes on a GPU it was built for.")
    kv_cache: Literal["bf16", "int8"] | None = Field(
        None, description="How keys and values are held; nothing: fp32 beside fp32 weights, else bf16."
    )
    drafter_device: str = Field("auto", description="auto, cpu or cuda:N.")
    vram: Bytes | None = Field(
        None,
        gt=0,
        description="GPU memory for drafter and layers, such as 3GiB; nothing: what is free less a margin.",
    )
    stream_prefill: bool = Field(
        False,
        description="Long prompts are read by the GPU, layers streamed to it; its rounding may change an answer.",
    )
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    threads: int | None = Field(None, ge=1, description="CPU threads; nothing: every core this process may use.")
    context: int | None = Field(None, ge=2, description="Longest prompt and answer, in tokens.")
    max_seqs: int = Field(4, ge=1, description="Requests decoded at the same time.")
    max_waiting: int = Field(64, ge=1, description="Requests that may wait; more are answered with 429.")
    cache: Bytes | None = Field(
        None,
        ge=0,
        description="Memory for prompts already read, such as 1GiB; 0 keeps none; nothing: 512MiB if it fits.",
    )
    cache_file: Path | None = Field(
        None, description="File that prompts already read are kept in from one start to the next; nothing: none."
    )
    rows: int | None = Field(None, ge=1, description="Most rows of a verify pass for one request, root included.")
    top_k: int | None = Field(None, ge=1, description="Children a drafted node may have.")
    depth: int | None = Field(None, ge=0, description="Draft levels after the first.")
    api_key: Keys = Field((), description="Key that clients must send; may be repeated.")
    api_key_file: Path | None = Field(
        None, description="File with a key a line; blank lines and those that begin with # are passed over."
    )
    allowed_hosts: Names = Field(
        (), description="Host names that requests may name where only this machine is listened to; '*': any."
    )
    cors_origins: Names = Field((), description="Origins whose pages may read answers; nothing: none; '*': all.")
    tls_cert: Path | None = Field(None, description="Certificate chain in PEM; with --tls-key it makes HTTPS.")
    tls_key: Path | None = Field(None, description="Private key of the certificate in PEM.")
    rate_limit: float | None = Field(
        None, gt=0, description="Requests a minute of one key, or of one address where there are no keys."
    )
    max_per_key: int | None = Field(
        None, ge=1, description="Requests of one key, or of one address, that may be open at once."
    )
    max_connections: int = Field(1024, ge=1, description="Connections that may be open at once.")
    vision: Names | None = Field(
        None, description="Folder or .onnx file of a vision model, may be repeated; 'none': no vision."
    )
    no_llm: bool = Field(False, description="Serve no language model, only vision.")
    vision_batch: int = Field(8, ge=1, le=64, description="Images that may go through a vision model at once.")
    vision_pixels: int = Field(25_000_000, ge=1, description="Pixels an image may have; larger ones are refused.")
    vision_url_hosts: Names = Field(
        (), description="Host names from which images may be fetched over https; nothing: URLs are refused."
    )
    model_name: str | None = Field(None, min_length=1, description="Name the model is served under.")
    sampling_defaults: Literal["model", "openai"] = Field(
        "model", description="Where sampling comes from that a request leaves out: 'model' is generation_config.json."
    )
    strict: bool = Field(False, description="Refuse unknown request fields instead of ignoring and reporting them.")
    keepalive_s: float = Field(10.0, gt=0, description="Seconds of silence after which a stream sends a comment.")
    send_timeout_s: float = Field(
        30.0, gt=0, description="Seconds that a client may leave its answer unread before it is cut off."
    )
    drain_s: float = Field(30.0, ge=0, description="Seconds that running requests get at shutdown.")
    watchdog_s: float = Field(120.0, gt=0, description="Seconds of one engine step after which it counts as stuck.")
    otlp_endpoint: str | None = Field(
        None, description="OpenTelemetry collector that traces are sent to, as http://HOST:4318 (extra otel)."
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people, or JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @field_validator("drafter_device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda:\d+", value):
            raise ValueError(f"{value!r} is no device; use auto, cpu or cuda:N")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _address_of_a_collector(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^\s/]\S*", value):
            raise ValueError(f"{value!r} is no address of a collector; write one as http://HOST:4318")
        return value

    @model_validator(mode="after")
    def _a_file_of_something(self) -> Settings:
        if self.cache_file is not None and self.cache == 0:
            raise ValueError("cache_file and cache 0 contradict each other: nothing would be kept; leave one out")
        if self.cache_file is not None and self.stream_prefill:
            raise ValueError("cache_file and stream_prefill contradict each other: the file is of one device's pages")
        if self.cache_file is not None and self.cache_file.is_dir():
            raise ValueError(f"cache_file {str(self.cache_file)!r} is a folder; name a file")
        return self

    @field_validator("api_key")
    @classmethod
    def _keys_that_headers_hold(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for key in value:
            check_key(key.get_secret_value())
        return value

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; name both, or neither")
        for name in ("tls_cert", "tls_key", "api_key_file"):
            file: Path | None = getattr(self, name)
            if file is not None and not file.is_file():
                raise ValueError(f"{name} {str(file)!r} is no file")
        return self

    @model_validator(mode="after")
    def _something_to_serve(self) -> Settings:
        if self.no_llm and self.target is not None:
            raise ValueError(f"no_llm and target {self.target!r} contradict each other; leave one out")
        if self.no_llm and self.vision == (NO_VISION,):
            raise ValueError("no_llm and vision none leave nothing to serve")
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key that opens the server, those of the file too. Errors: SettingsError."""
        found = [key.get_secret_value() for key in self.api_key]
        return tuple(dict.fromkeys(found if self.api_key_file is None else [*found, *read_keys(self.api_key_file)]))

    @property
    def served_name(self) -> str:
        """The name clients use: as asked, else the target's last path part, else the default's."""
        if self.model_name is not None:
            return self.model_name
        return BUNDLED if self.target is None else Path(self.target).name.removesuffix(".gguf") or self.target


def check_key(key: str) -> None:
    """Errors: ValueError for a key that no header can hold; the key itself is not told."""
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("a key is empty, or holds blanks or characters beyond ASCII, which no header carries")


def read_keys(file: Path) -> list[str]:
    """The keys of a file, one a line. Errors: SettingsError; a file without any would leave the server open."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        for key in keys:
            check_key(key)
    except (OSError, ValueError) as error:
        raise SettingsError(f"api_key_file {str(file)!r} cannot be used: {error}") from error
    if not keys:
        raise SettingsError(f"api_key_file {str(file)!r} holds no key; write one a line")
    return keys


def load_settings(flags: Mapping[str, Any], config: Path | None = None) -> Settings:
    """Join all sources. ``flags`` holds only what the user gave. Errors: SettingsError, one line for each fault.

    An environment variable of ours that no setting has is logged with the name it may have been meant for.
    """
    warn_of_misspelt(os.environ)
    if config is not None and not config.is_file():
        raise SettingsError(f"the configuration file {config} does not exist")

    class Sources(Settings):
        """Settings read from this configuration file as well."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """Flags, environment, file; no .env file is read unasked."""
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config)

    try:
        return Sources(**flags)
    except ValidationError as error:
        in_file = set() if config is None else set(tomllib.loads(config.read_text(encoding="utf-8", errors="replace")))
        faults = (f"{describe_fault(fault)}{source_of(fault, flags, in_file, config)}" for fault in error.errors())
        raise SettingsError("; ".join(faults)) from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{config} is not TOML: {error}") from error
    except OSError as error:
        raise SettingsError(f"{config} cannot be read: {error.strerror}") from error


def warn_of_misspelt(environment: Iterable[str]) -> None:
    """One line for each ``DOVETAIL_*`` variable that nothing reads."""
    known = {name.upper() for name in Settings.model_fields} | OTHER_VARIABLES
    for name in sorted(environment):
        ending = name.upper().removeprefix(PREFIX)
        if name.upper().startswith(PREFIX) and ending not in known:
            nearest = difflib.get_close_matches(ending, known, 1)
            hint = f"; did you mean {PREFIX}{nearest[0]}?" if nearest else ""
            logger.warning("the environment variable %s is not read by anything%s", name, hint)


def describe_fault(fault: Mapping[str, Any]) -> str:
    """One validation fault as a line that names the setting and says what is allowed."""
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; known are {', '.join(Settings.model_fields)}"
    message = "Input should be a list of texts" if fault["type"] == "tuple_type" else fault["msg"]
    message = message.removeprefix("Value error, ")
    return f"{name}: {message}" if name else message


def source_of(fault: Mapping[str, Any], flags: Mapping[str, Any], in_file: set[str], config: Path | None) -> str:
    """Where a wrong value stands that is not on the command line, in brackets."""
    name = str(fault["loc"][0]) if fault["loc"] else ""
    where = origin(name, flags, in_file, config)
    return f" ({where})" if name in Settings.model_fields and where != COMMAND_LINE else ""


def origin(name: str, flags: Mapping[str, Any], in_file: Iterable[str], config: Path | None) -> str:
    """Where a setting comes from: ``flags`` holds what the command line gave, None where nothing; ``in_file`` the names
    that ``config`` has."""
    variable = f"{PREFIX}{name.upper()}"
    if flags.get(name) is not None:
        return COMMAND_LINE
    if variable in {each.upper() for each in os.environ}:
        return variable
    return str(config) if name in in_file else "default"
