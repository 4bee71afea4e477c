"""whalepod serves DeepSeek-V4 on Ray with attention and experts on separate actors."""

__version__ = "0.1.0"
