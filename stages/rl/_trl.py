"""What PPO takes from inside TRL, which may change with any release: all of it is imported here, and nowhere else in this room.

tests/test_rl_trl.py holds what is relied upon against the TRL that is installed.
"""
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

__all__ = ["VLLMGeneration", "is_vllm_available"]
