"""What the plugin replaces in vLLM: each point is there, and a start-up stops where one is not."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.platforms import cpu_platform_plugin
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_attn import patches
from vllm_attn.report import StartupError

pytestmark = pytest.mark.integration


def test_every_point_is_there() -> None:
    assert patches.missing_points() == []


def test_an_untried_version_without_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "version", lambda name: "0.34.0")
    monkeypatch.setattr(patches, "POINTS", [*patches.POINTS, ("vllm.gone:Layer", "forward")])
    with pytest.raises(StartupError, match=r"vLLM 0\.34\.0 has no Layer\.forward, which attnserve"):
        patches.check_version()


def test_loaders_take_what_is_passed_on() -> None:
    from vllm.model_executor.model_loader import DefaultModelLoader, RunaiModelStreamerLoader

    for loader in (DefaultModelLoader, RunaiModelStreamerLoader):
        patches.stock(loader, "load_weights", "self", "model", "model_config")


def platform(**members: Any) -> Any:
    """Return a subclass of vLLM's CPU platform."""
    base: Any = resolve_obj_by_qualname(cpu_platform_plugin() or "")
    return type("Platform", (base,), members)


def test_a_platform_honours_variants() -> None:
    assert patches.honour_variants(platform()).honours_variants


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("get_attn_backend_cls", classmethod(lambda cls, layer: "")),
        ("update_block_size_for_backend", None),
    ],
)
def test_a_method_that_moved_stops_the_start(name: str, moved: Any) -> None:
    with pytest.raises(StartupError, match=rf"has no Platform\.{name}\(.*0\.32 to 0\.33"):
        patches.honour_variants(platform(**{name: moved}))
