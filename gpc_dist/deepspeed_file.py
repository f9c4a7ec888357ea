"""The DeepSpeed JSON that `engine.ds_config` names: read and checked, and what it says of the program's own keys.

Nothing here imports torch or DeepSpeed, so that a file is refused wherever a configuration is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpc_dist.deepspeed_keys import OFFLOAD, ZERO, leaves, problem
from gpc_dist.errors import UserError
from gpc_dist.files import read_text
from gpc_dist.parsing import parse_json
from gpc_dist.shipped import shipped_folder


def regimes() -> list[str]:
    """Names of the packaged files."""
    return sorted(path.stem for path in shipped_folder("ds_configs").glob("*.json"))


def packaged(name: str) -> dict[str, Any]:
    """The values of a packaged regime."""
    values: dict[str, Any] = _read(shipped_folder("ds_configs") / f"{name}.json")
    return values


def is_own(name: str | None) -> bool:
    """Whether `engine.ds_config` names a file of the user's, and not a packaged regime."""
    return name is not None and name.endswith(".json")


def read(name: str) -> dict[str, Any]:
    """The values of a DeepSpeed JSON: a packaged regime, or a path.

    Raises:
        UserError: no such file, invalid JSON, a key that DeepSpeed does not have or that the program refuses, or a
            value of another type.
    """
    if not is_own(name) and name in regimes():
        return packaged(name)
    if not is_own(name) or not Path(name).is_file():
        raise UserError(f"engine.ds_config '{name}' is neither a JSON file nor one of {', '.join(regimes())}")
    values = _read(Path(name))
    if not isinstance(values, dict):
        raise UserError(f"engine.ds_config {name} is not a JSON object, as DeepSpeed's configuration is")
    problems = [said for key, value in leaves(values) if (said := problem(key, value))]
    if problems:
        raise UserError(
            "\n".join([f"engine.ds_config {name}:", *problems, "docs/deepspeed.md says it for every key"])
        )
    return values


def _read(path: Path) -> Any:
    return parse_json(read_text(path), f"engine.ds_config {path}")


def with_file(engine: Mapping[str, Any]) -> dict[str, Any]:
    """The section `engine` of a configuration with the keys that its DeepSpeed file decides.

    Raises:
        UserError: the section says something else than the file; or see `read`.
    """
    found = dict(engine)
    for key, (said, value) in _decided(engine["ds_config"]).items():
        if (given := found.setdefault(key, value)) != value:
            raise UserError(
                f"engine.ds_config '{engine['ds_config']}' has {said}, but engine.{key} is {_word(given)}: leave out "
                "one of them, or make them agree"
            )
    return found


def _decided(name: str) -> dict[str, tuple[str, Any]]:
    """Keys of `engine` that a file decides: what it says, and the value that this is."""
    given = {key: value for key, value in leaves(read(name)) if value is not None and value != "auto"}
    stage = int(given.get(f"{ZERO}.stage", 0))
    found: dict[str, tuple[str, Any]] = {"zero_stage": (f"ZeRO stage {stage}", stage)}
    if (device := given.get(f"{OFFLOAD}.device")) is not None:
        found["offload_param"] = f"offload_param.device {device}", device
    path = given.get(f"{OFFLOAD}.nvme_path")
    if (
        device == "nvme" and path is not None and is_own(name)
    ):  # a packaged regime names no place on this machine
        found["nvme_path"] = f"offload_param.nvme_path {path}", str(Path(path))
    if stage == 3:
        if (int8 := given.get(f"{ZERO}.zero_quantized_nontrainable_weights")) is not None:
            said = f"zero_quantized_nontrainable_weights {_word(int8)}"
            found["quantize"] = said, "int8" if int8 else "none"
        if (ranks := given.get(f"{ZERO}.zero_hpz_partition_size")) is not None:
            found["hpz"] = f"zero_hpz_partition_size {ranks}", ranks > 1
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
