"""Quantized weights on disk until their checkpoint is written, so that a killed run goes on."""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from attnserve.errors import UserError
from quant_kernels.pack import pack, unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec, TwoLevelWeight


class Kept(dict[str, QuantizedWeight]):
    """The weights of a run by their layers' names; each is a file from when it is set.

    Args:
        folder: of the files; those of a run with another key are removed.
        key: what the weights depend on.

    Raises:
        UserError: another process uses the folder.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        super().__init__()
        self.folder, text = folder, json.dumps(key)
        folder.mkdir(parents=True, exist_ok=True)
        self.key = open(folder / "key.json", "a+", encoding="utf-8")  # noqa: SIM115  the lock
        try:
            fcntl.flock(self.key, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is using {folder}: wait for it, or name another output"
            ) from None
        self.key.seek(0)
        if self.key.read() != text:
            for file in folder.glob("*.safetensors"):
                file.unlink()
            self.key.truncate(0)
            self.key.write(text)
            self.key.flush()
        for file in folder.glob("*.safetensors"):
            try:
                super().__setitem__(file.stem, read(file))
            except SafetensorError:  # the machine went down before it was on the disk
                file.unlink()

    def __setitem__(self, name: str, weight: QuantizedWeight) -> None:
        super().__setitem__(name, weight)
        spec = weight.spec
        tensors = {"packed": pack(weight.values, spec.bits), "scales": weight.scales}
        if weight.zeros is not None:
            tensors["zeros"] = weight.zeros
        if isinstance(weight, TwoLevelWeight):
            tensors["levels"] = weight.levels
        about = [spec.bits, spec.group_size, spec.symmetric, weight.values.shape[1]]
        part = self.folder / "part"
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        try:
            save_file(contiguous, part, metadata={"about": json.dumps(about)})
        except SafetensorError as error:
            part.unlink(missing_ok=True)
            # No UserError: what is quantized stays, for the next run.
            raise OSError(f"{self.folder.parent} cannot be written: {error}") from None
        os.replace(part, self.folder / f"{name}.safetensors")

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Let another run use the folder."""
        self.key.close()


def read(file: Path) -> QuantizedWeight:
    """Return the weight in a file."""
    with safe_open(file, framework="pt") as opened:
        bits, group_size, symmetric, columns = json.loads(opened.metadata()["about"])
        tensors: dict[str, torch.Tensor] = {
            name: opened.get_tensor(name)
            for name in opened.keys()  # noqa: SIM118  no mapping
        }
    values = unpack(tensors["packed"], bits, columns)
    spec = QuantSpec(bits, group_size, symmetric)
    if "levels" in tensors:
        return TwoLevelWeight(values, tensors["scales"], None, spec, levels=tensors["levels"])
    return QuantizedWeight(values, tensors["scales"], tensors.get("zeros"), spec)
