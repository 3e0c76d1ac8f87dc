"""The main job on a real guest, side by side with the conventional way."""

from ouassister.demo.demo import run_demo

__all__ = ["run_demo"]
